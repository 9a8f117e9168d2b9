"""The command `plot`: pictures of runs."""
