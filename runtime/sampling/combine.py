"""Linear combinations of latents on the host, the reference for those on a device."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.sampling.stepping import Latent


def combine_fp32(terms: Sequence[tuple[float, Latent]]) -> NDArray[np.float32]:
    """The sum of coefficient·array, float32, added in the order given."""
    (coefficient, array), *rest = terms
    total: NDArray[np.float32] = np.multiply(array, coefficient, dtype=np.float32)
    for coefficient, array in rest:
        total += np.multiply(array, coefficient, dtype=np.float32)
    return total
