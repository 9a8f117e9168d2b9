"""The configuration of a run, read from flags, presets and stored files."""
