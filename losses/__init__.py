"""Losses that BasicSR's option files can name."""
