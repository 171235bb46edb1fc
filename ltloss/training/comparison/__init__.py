"""``ltloss compare``: methods, tuning, final runs and tables."""
