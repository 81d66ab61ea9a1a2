"""Lynx in a block: the keys and values of a face, and the attention to them (addons_spec.md 2.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model

Keys = tuple[Array, Array]  # a block has keys and values, [heads, n, head_dim] each


@dataclass(frozen=True)
class LynxKeys:
    """One side of the guidance. Without the IP or the ref adapter that half is None. `ip` has the blocks with
    an adapter.
    """

    ip: Mapping[int, Keys] | None
    ref: Sequence[Keys] | None
    ip_scale: Array  # [1]
    ref_scale: Array  # [1]


def with_ip(model: Model, keys: LynxKeys, n: int, cross_q: Array, attended: Array) -> Array:
    """The result of block n's cross-attention with that of its IP adapter."""
    if keys.ip is None or n not in keys.ip:
        return attended
    return model.run("lynx_ip", cross_q, attended, *keys.ip[n], keys.ip_scale)[0]


def with_ref(
    model: Model, keys: LynxKeys, n: int, q: Array, rope: tuple[Array, Array], attended: Array
) -> Array:
    """The result of block n's self-attention with that of its ref adapter. `q` has been rotated."""
    if keys.ref is None:
        return attended
    return model.run("lynx_ref", q, *rope, attended, *keys.ref[n], keys.ref_scale)[0]
