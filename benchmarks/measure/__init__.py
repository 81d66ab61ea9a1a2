"""Measurements of this program, its peers, the machine and its ceilings."""
