"""SAM2 video segmentation as data: the eight models, and the contracts of their graphs."""
