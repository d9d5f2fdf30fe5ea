"""Several processes, by Ray."""
