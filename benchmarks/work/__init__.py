"""The work of a job, computed from sizes: FLOPs, bytes, lower bounds and the law fitted to them."""
