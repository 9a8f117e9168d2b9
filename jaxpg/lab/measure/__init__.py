"""Measurement: gradients by sampling, their statistics and the routes to their trace."""
