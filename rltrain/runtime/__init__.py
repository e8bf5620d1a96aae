"""Ranks, deadlines, signals."""
