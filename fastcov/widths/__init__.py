"""Widths of the next network, from the spectra of this one."""
