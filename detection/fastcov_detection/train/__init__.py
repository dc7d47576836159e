"""Training of one network: the loop, its schedule, logs and folder, and the metric of record."""
