"""Poses of the driving person moved to the proportions of the reference."""
