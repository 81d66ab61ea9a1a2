"""What a checkpoint file is: the names it uses, how its numbers are stored, or which other model it holds."""
