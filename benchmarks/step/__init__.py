"""The whole training step of a head, optimizer included: its time, and the memory of its process."""
