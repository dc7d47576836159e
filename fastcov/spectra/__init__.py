"""Spectra of layers, their history over a training, and the comparison of two trainings."""
