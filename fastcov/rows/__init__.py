"""Activations as feature rows, and which of them are read."""
