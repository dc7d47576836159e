"""Data sets in COCO format: found, checked whole before the first step, read in batches."""
