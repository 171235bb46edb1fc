"""The parts of :mod:`ltloss.sklearn`: the feature space, losses to choose from, training, calibration, files."""
