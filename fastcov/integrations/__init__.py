"""Callbacks and loggers for other frameworks: one file each, which imports only its framework."""
