"""Video while it is filmed: frames come from a source at its own rate, and windows go out as they are made."""
