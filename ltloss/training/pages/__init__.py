"""The HTML pages and plots that a run, a comparison and a prediction write."""
