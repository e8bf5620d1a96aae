"""A run's policy as a plain transformers folder with a model card, on this machine or on the hub."""
