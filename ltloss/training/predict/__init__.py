"""Classify images with a run and sort them into folders."""
