"""The worlds that the studies run on, with exact answers where they exist."""
