"""Programs to read and to run. A package, for an installed one of this name would come before a mere folder."""
