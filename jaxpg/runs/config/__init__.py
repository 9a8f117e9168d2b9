"""Configuration: what a run is asked to be, from flags, presets and stored files."""
