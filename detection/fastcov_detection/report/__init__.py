"""Pages, figures and tables of a search."""
