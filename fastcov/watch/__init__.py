"""Hooks inside the training loop: selection of tensors, steps, and reading of activations."""
