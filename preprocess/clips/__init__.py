"""The prepared clips: their names, sizes, sampling, reading ahead and writing."""
