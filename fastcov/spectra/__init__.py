"""Spectra of layers, and their history over a training."""
