"""Reading clips and writing videos."""
