"""The policy: loading it, its log-probs of a packed micro-batch, and the models that score for it."""
