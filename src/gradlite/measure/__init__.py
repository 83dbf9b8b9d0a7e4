"""Observed bytes and times."""
