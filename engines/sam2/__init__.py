"""SAM2 video segmentation as data: the eight models, and what goes in and out of their graphs."""
