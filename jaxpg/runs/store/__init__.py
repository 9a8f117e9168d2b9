"""Storage: a run's folder and every kind of file in it."""
