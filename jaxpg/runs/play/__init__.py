"""The commands `evaluate`, `record` and `render`: what a trained policy does."""
