"""``python -m benchmarks.gpu --tune``: times the candidate tiles."""
