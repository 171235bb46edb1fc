"""Does it help? Trainings, their table and their page."""
