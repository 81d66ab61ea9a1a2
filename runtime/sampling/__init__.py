"""Noise levels and the samplers that step through them (flow matching, model_spec.md 4).

A latent at level sigma is x = (1 - sigma)·clean + sigma·noise; the model predicts the velocity noise - clean,
so that clean = x - sigma·velocity. Levels fall from (almost) 1 to exactly 0 in N steps. A *grid* chooses the
levels and the timesteps. A *sampler* turns (latent, velocity) of one level into the next latent.

All coefficients are computed on the host in float64. Of the package only combine.py imports numpy: the
command line takes its choices from the tables SAMPLERS and GRIDS.
"""
