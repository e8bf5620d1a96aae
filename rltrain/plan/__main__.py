"""``python -m rltrain.plan``."""

from rltrain.plan.memory import main

if __name__ == "__main__":
    main()
