"""Classify images or embeddings with a run, and sort images into folders."""
