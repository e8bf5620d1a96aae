"""Several seeds of several methods: what the runs show about the difference, and what they do not."""
