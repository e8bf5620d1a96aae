"""Environments: what answers the turns of the model, a tool or a partner. Each is one file of this package."""
