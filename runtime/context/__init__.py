"""Context windows: one long latent, denoised in overlapping parts whose velocities are fused in every step.

Slots are numbered in the whole latent [16, S, h, w]: slot 0 is the reference's, slot g is latent frame g-1 of
the video and shows the pixel frames 4(g-1)-3 to 4(g-1). One forward of the model takes `size` of them.
"""
