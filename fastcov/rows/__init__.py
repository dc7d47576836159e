"""Activations as feature rows: views, layouts, dtypes, and the choice of the rows that are read."""
