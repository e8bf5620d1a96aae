"""rltrain: reinforcement-learning post-training for language models, built around credit assignment."""

__version__ = "0.2.0"
