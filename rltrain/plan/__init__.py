"""Memory per rank, from the config alone."""
