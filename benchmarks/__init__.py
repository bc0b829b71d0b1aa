"""Benchmarks: one script a mechanism, one for networks, and what they share."""
