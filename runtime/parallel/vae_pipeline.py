"""The native VAE over several GPUs, a part of its layers on each, as a pipeline over the chunks of a clip.

Rank N-1 has the first layers and rank 0 the last ones, so decoded frames are on rank 0. A rank runs its part
for chunk i, copies what lives at the cut into the next rank's scratch, and goes on with chunk i + 1 in its
other scratch. Caches stay with their layers. Kernels and their order are those of one GPU, and so are the bits.

All ranks run the same chunks of the same clips in the same order. Runs are numbered from 1 over all of them;
run n uses scratch n % 2 everywhere, and its number is the value of three flags of each rank:

    DATA    its input has arrived                               (set by rank + 1)
    DONE    the next rank's scratch is free for run n + 2       (set by rank - 1)
    RESULT  the latent of an encoded chunk is in its slot       (set by rank 0)

The host never waits, except for latents. A rank runs part n of encoding only when it has read latent n - SLOTS, and
a latent needs all ranks' parts, so slot n % SLOTS is free when rank 0 writes it.

Predicted for an H200 with 22.5 ms of decoding and 15.0 of encoding a chunk, 20 chunks of 832x480 (docs/log.md,
convolutions by their measured rates, caches and passes by their bytes at 2.7 TB/s, NVLink at 350 GB/s): 57 % of
decoding is behind the last doubling or just before it (six convolutions each of 1.1 to 1.4 ms), so no layer
limits eight parts.

    ranks                      1          2                  4                  8
    decode, longest part       22.5 ms    11.4               5.8                3.2
    handed over a chunk                   307 MB             77 to 613 MB       38 to 613 MB
    decode, a window           0.44 s     0.24               0.14               0.095
    encode, longest part       15.0 ms    7.9                4.3                2.5
    encode, a clip             0.29 s     0.16               0.10               0.072
"""

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Protocol

import numpy as np

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.contract import Network, Tensor
from trt_wan.runtime.device.gpu import Gpu, Stream
from trt_wan.runtime.executors import Array
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.vae_parts import balanced, common_cuts, part_bounds, part_name, part_network
from trt_wan.runtime.segments.native.vae import Vae
