"""Finding people in frames and following them: boxes, poses, tracks."""
