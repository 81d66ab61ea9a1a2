"""The machine under a benchmark: its card, its ceilings, its clocks, and the memory in use."""
