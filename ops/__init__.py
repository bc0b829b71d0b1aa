"""Attention mechanisms, one folder each."""
