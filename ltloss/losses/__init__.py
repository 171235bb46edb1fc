"""The loss modules: each holds the prototypes, computes its loss and predicts."""
