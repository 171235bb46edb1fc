"""One training run: settings, run folder, trainer, checkpoints."""
