"""LoRA files, from their names to merged weights."""
