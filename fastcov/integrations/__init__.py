"""Trackers inside other training loops: one file a framework, each importing only its own."""
