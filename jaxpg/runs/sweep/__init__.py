"""The command `sweep`: many points of hyperparameter space, ranked."""
