"""What runs inside the training loop: which tensors are watched, and when."""
