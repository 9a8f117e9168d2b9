"""Worlds: what the studies run on, with exact answers where there are any."""
