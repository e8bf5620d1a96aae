"""What the command line knows of the options: their keys, how they are written, what can be chosen by name."""
