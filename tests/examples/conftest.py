"""The small data and runs of the training tests serve here too."""

from helpers.training import in_empty_folder, one_thread, run, toy_folder, toy_npz, toy_run

__all__ = ["in_empty_folder", "one_thread", "run", "toy_folder", "toy_npz", "toy_run"]
