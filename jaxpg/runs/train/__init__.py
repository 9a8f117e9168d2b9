"""Training runs: built, laid over devices, looped, evaluated and reported."""
