"""Helpers around training: data loading."""
