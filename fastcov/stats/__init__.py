"""Statistics of a layer, and the ways in which rows reach them."""
