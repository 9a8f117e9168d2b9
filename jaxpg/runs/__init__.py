"""Everything around training: configuration, the host loop, the run's folder, progress and tables."""
