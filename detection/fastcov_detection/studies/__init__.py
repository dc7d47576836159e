"""Studies around the search: pretraining, comparisons, exports and the plan of the evidence."""
