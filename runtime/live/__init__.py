"""Video while it is filmed: frames come from a source at its own rate, and each window goes out at once."""
