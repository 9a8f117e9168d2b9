"""The commands `evaluate`, `record` and `render`, which run a trained policy."""
