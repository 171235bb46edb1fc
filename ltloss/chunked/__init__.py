"""The PyTorch backend: classes a chunk at a time, on any device, without Triton."""
