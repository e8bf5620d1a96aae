"""Untrusted work in killable processes."""
