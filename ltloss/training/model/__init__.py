"""Backbones, and the classifier that joins one to a loss."""
