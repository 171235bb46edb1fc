"""From files to batches of images or embeddings."""
