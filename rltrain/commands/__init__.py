"""Commands beside the entry points: ``rltrain sample`` and ``rltrain new``."""
