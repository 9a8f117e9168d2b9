"""Training: the table of algorithms, and the one loop that runs every row of it."""
