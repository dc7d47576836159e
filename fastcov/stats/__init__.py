"""What one layer's statistics are, and how rows reach them."""
