"""Which engine, kernel or library computes a network."""
