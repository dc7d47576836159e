"""Detectors of any widths: built, initialised, their width groups found, their cost counted."""
