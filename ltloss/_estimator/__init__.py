"""What :mod:`ltloss.sklearn` is made of: a space, losses to choose from, training, calibration."""
