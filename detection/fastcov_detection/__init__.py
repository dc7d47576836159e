"""Faster R-CNN and Mask R-CNN with backbones of any widths, and the search that sets the widths."""

__version__ = "0.1.0"
