"""Sequence parallelism between GPUs of one host (protocol: sequence.py, geometry: shards.py). Copy engines
write into the other ranks' memory while the GPUs compute; the host never waits.

A rank's block of peer memory holds q, k and v of its heads over all tokens, a part for each group of heads.
Behind them are the attended rows of its tokens from every rank's heads, for each group [rank, row, channels
of the group]. The array that `join` returns takes the same memory.

With `to_rows` nothing is copied inside a GPU, for such copies are kernels, which attention waits for: 0.56 ms
of a block (docs/log.md). Attention reads the own tokens where they are. Behind q, k and v of the others are
the rows of all heads [row, channels]: it writes the own heads, and other ranks copy theirs to their columns.

Two side streams copy: `_send` writes q, k and v to the other ranks; `_back` copies the own part of them and
returns attended rows. Every source has a flag for each group, whose value is the number of the last call of
which the part has arrived.

No write overtakes a read:
- The caller's arrays and the attended groups. The compute stream waits for both side streams before `attend`
  returns, so the arena, which knows one stream, may hand out their memory again.
- q, k and v in the block of rank B. Rank A writes those of call s+1 after its own call s, which ends with
  B's rows of every group of call s. B sends these after it has attended.
- Attended rows in B's block. A writes those of call s+1 after it has B's q, k and v of call s+1. B sends
  these after its compute stream has ended call s, and with `to_rows` all that the caller enqueued behind it.
  B's own attention writes there on the compute stream.
- So every rank signals every other for each group, with or without data. With `to_rows` one signal, behind
  the last group, says that the rows of all groups have arrived: one stream copies them.
- The array of `join`, which the caller reads. Before the ranks write again, they tell each other that they
  are done with their blocks: in `join`, and in the first `attend` after it.

No deadlock: all ranks call the same functions in the same order, and each signal stands before its wait in
this order. One stream a rank would be enough, so streams may share a hardware queue, and a host may wait for
its whole GPU at any point. Results have the same bits for the same number of ranks: a rank computes fixed
heads over all tokens in the plan's order, and copies change no bits.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from trt_wan.errors import TrtWanError
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.checked import cuda_core
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.executors import Array
from trt_wan.runtime.parallel.peer_memory import VECTOR, PeerMemory, Pieces
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.sequence import Attention
from trt_wan.runtime.parallel.shards import Shards

NAMES = ("q", "k", "v")


def block_bytes(shards: Shards, dtype: DTypeLike, joined: int = 0) -> int:
    """Bytes of peer memory on every rank. `joined`: those of the largest array that `join` returns."""
    return max(_Layout(shards, np.dtype(dtype).itemsize).size, joined)


class PeerSequence:
    """For q, k and v of type `dtype`. `memory` has `block_bytes` bytes and `flags_of` flags."""

    def __init__(self, gpu: Gpu, rank: int, shards: Shards, memory: PeerMemory, dtype: DTypeLike) -> None:
        self._gpu, self._rank, self.shards, self.memory = gpu, rank, shards, memory
        self._dtype = np.dtype(dtype)
        self._layout = _Layout(shards, self._dtype.itemsize)
        # Each rank begins with the next one, so that no two write to the same at once.
        self._others = [(rank + i) % shards.ranks for i in range(1, shards.ranks)]
        self._send, self._back = gpu.device.create_stream(), gpu.device.create_stream()
        self._calls = self._ready = self._joins = 0
        self._joined = False  # whether the caller may still read the array of a join
        self._tables: list[Any] = []  # the memory of `places`
        self._places = self._make_places() if shards.to_rows else []

    @staticmethod
    def open(gpu: Gpu, ranks: Ranks, shards: Shards, dtype: DTypeLike, joined: int = 0) -> "PeerSequence":
        """Takes the peer memory, on all ranks at the same time. Raises EnvironmentBroken, MemoryShort."""
        memory = PeerMemory(gpu, ranks, block_bytes(shards, dtype, joined), flags_of(shards))
        return PeerSequence(gpu, ranks.rank, shards, memory, dtype)

    def close(self) -> None:
        """Call before the Gpu's `close`."""
        self.memory.close()
        for table in self._tables:
            with suppress(TrtWanError), cuda_core():  # after a fault
                table.close(self._gpu.stream)
        for stream in (self._send, self._back):
            stream.close()

    def split(self, x: Array) -> Array:
        shards, stream = self.shards, self._gpu.stream
        given, own = cast(DeviceArray, x), shards.tokens_of(self._rank)
        row = given.nbytes // given.shape[0]
        rows = self._gpu.empty((shards.slots * shards.share, *given.shape[1:]), given.dtype)
        whole, part = shards.slot_tokens * row, shards.share * row
        source = given.address + own.start * row, whole
        self.memory.copy((rows.address, part), source, len(own) * row, shards.slots, stream)
        padding = rows.address + len(own) * row, part
        self.memory.clear(padding, part - len(own) * row, shards.slots, stream)
        return cast(Array, rows)

    def attend(self, attention: Attention, q: Array, k: Array, v: Array) -> Array:
        shards, given = self.shards, [cast(DeviceArray, array) for array in (q, k, v)]
        assert all(array.dtype == self._dtype for array in given), [array.dtype for array in given]
        stream, groups = self._gpu.stream, range(len(self.shards.groups))
        self._calls += 1
        if self._joined:
            self._let_write()
            if shards.to_rows:
                self._clear_own()
        self._follow(self._send, self._back)
        if shards.to_rows:
            return self._attend_to_rows(attention, given)
        own = [self._give(group, given) for group in groups]
        made, back = [], []  # `made` is kept until the side streams have read it
        for group in groups:
            stream.wait(own[group])
            self._await("given", group)
            attended = attention(*self._received(group)) if self._heads(self._rank, group) else None
            made.append(attended)
            back.append(self._return(group, cast(DeviceArray | None, attended)))
        out = self._gpu.empty((shards.slots * shards.share, shards.heads * shards.head_dim), self._dtype)
        for group in groups:
            stream.wait(back[group])
            self._await("returned", group)
            self._lay_beside(out, group)
        stream.wait(self._send.record())
        return cast(Array, out)

    def _attend_to_rows(self, attention: Attention, given: Sequence[DeviceArray]) -> Array:
        """The array is valid until the next call."""
        shards, stream, last = self.shards, self._gpu.stream, len(self.shards.groups) - 1
        for group in range(last + 1):
            self._give_others(group, given)
        made = []  # kept until the side stream has read it
        for group in range(last + 1):
            self._await("given", group)
            inputs = *self._received(group), *self._own(group, given), self._places[group]
            made.append(cast(DeviceArray, attention(*inputs)))
            self._return_rows(group, made[-1])
        for rank in self._others:
            self._signal(rank, "returned", last, self._calls, self._back)
        self._await("returned", last)
        for side in (self._back, self._send):
            stream.wait(side.record())
        rows = self.memory.address(self._rank) + self._layout.rows
        shape = shards.slots * shards.share, shards.heads * shards.head_dim
        return cast(Array, self._gpu.view(rows, shape, self._dtype))

    def _own(self, group: int, given: Sequence[DeviceArray]) -> list[Array]:
        """The own tokens of q, k and v of a group's heads."""
        shards, heads = self.shards, self._heads(self._rank, group)
        shape = len(heads), shards.slots * shards.share, shards.head_dim
        start = heads.start * shape[1] * self._layout.token
        views = [self._gpu.view(array.address + start, shape, self._dtype) for array in given]
        return cast(list[Array], views)

    def _clear_own(self) -> None:
        """Clears the part of `join`'s array that no rank writes: finite.py looks for NaNs in all inputs."""
        shards, own, token = self.shards, self.shards.tokens_of(self._rank), self._layout.token
        for group, name in product(range(len(shards.groups)), NAMES):
            start = self.memory.address(self._rank) + self._layout.at(name, group)
            target = start + own.start * token, shards.slot_tokens * token
            height = shards.groups[group] * shards.slots
            self.memory.clear(target, len(own) * token, height, self._gpu.stream)

    def _return_rows(self, group: int, attended: DeviceArray) -> None:
        """Enqueues the copies of a group's attended tokens into the rows of the ranks that have them."""
        shards, token, rows = self.shards, self._layout.token, self.shards.slots * self.shards.share
        width, first = shards.groups[group] * token, self._heads(self._rank, group).start
        self._follow(self._back)
        for rank in self._others:
            target = self.memory.address(rank) + self._layout.rows + first * token, shards.heads * token
            source = attended.address + (rank - (rank > self._rank)) * rows * width, width
            self.memory.copy(target, source, width, rows, self._back)

    def _make_places(self) -> list[Array]:
        """`places` of every group."""
        shards, made = self.shards, []
        rows, address = shards.slots * shards.share, self.memory.address(self._rank) + self._layout.rows
        for group in range(len(shards.groups)):
            first = self._heads(self._rank, group).start
            numbers = shards.slot_tokens, shards.share, self._rank, rows, shards.heads, first, address
            host = np.array(numbers, np.int64)
            self._tables.append(self._gpu.allocate(host.nbytes))
            table = self._gpu.view(int(self._tables[-1].handle), host.shape, host.dtype)
            self._gpu.write(table, host)
            made.append(cast(Array, table))
        return made

    def join(self, x: Array) -> Array:
        """The array is valid until the next call of `join` or `attend`."""
        shards, stream, given = self.shards, self._gpu.stream, cast(DeviceArray, x)
        row = given.nbytes // given.shape[0]
        own, whole = shards.tokens_of(self._rank), shards.slot_tokens * row
        source = given.address, shards.share * row
        assert shards.slots * whole <= self.memory.size, f"{shards.slots * whole} bytes to join"
        self._joins += 1
        self._let_write()
        self._follow(self._send)
        for rank in [*self._others, self._rank]:
            target = self.memory.address(rank) + own.start * row, whole
            self.memory.copy(target, source, len(own) * row, shards.slots, self._send)
            self._signal(rank, "joined", 0, self._joins, self._send)
        stream.wait(self._send.record())
        for rank in self._others:
            self.memory.wait(self._flag("joined", rank), self._joins, stream)
        self._joined = True
        shape = shards.slots * shards.slot_tokens, *given.shape[1:]
        return cast(Array, self._gpu.view(self.memory.address(self._rank), shape, given.dtype))

    def _give(self, group: int, given: Sequence[DeviceArray]) -> Any:
        """Enqueues the copies of q, k and v of a group's heads. Returns the event of the own part."""
        self._give_others(group, given)
        self._copy_heads(self._rank, group, given, self._back)
        return self._back.record()

    def _give_others(self, group: int, given: Sequence[DeviceArray]) -> None:
        for rank in self._others:
            self._copy_heads(rank, group, given, self._send)
            self._signal(rank, "given", group, self._calls, self._send)

    def _copy_heads(self, rank: int, group: int, given: Sequence[DeviceArray], stream: Any) -> None:
        shards, own, heads = self.shards, self.shards.tokens_of(self._rank), self._heads(rank, group)
        token = self._layout.token
        for name, array in zip(NAMES, given, strict=True):
            start = self.memory.address(rank) + self._layout.at(name, group)
            target = start + own.start * token, shards.slot_tokens * token
            head = shards.slots * shards.share * token
            source = array.address + heads.start * head, shards.share * token
            self.memory.copy(target, source, len(own) * token, len(heads) * shards.slots, stream)

    def _received(self, group: int) -> list[Array]:
        shards, start = self.shards, self.memory.address(self._rank)
        shape = (shards.groups[group], shards.slots * shards.slot_tokens, shards.head_dim)
        views = [self._gpu.view(start + self._layout.at(name, group), shape, self._dtype) for name in NAMES]
        return cast(list[Array], views)

    def _return(self, group: int, attended: DeviceArray | None) -> Any:
        """Enqueues the copies of a group's attended tokens to the ranks that have them. Returns the event."""
        shards, piece = self.shards, self._layout.piece(self._rank, group)
        width = shards.groups[group] * self._layout.token
        self._follow(self._back)
        for rank in [*self._others, self._rank]:
            if attended is not None:
                rows = shards.tokens_of(rank)
                target = self.memory.address(rank) + piece, shards.share * width
                source = attended.address + rows.start * width, shards.slot_tokens * width
                self.memory.copy(target, source, len(rows) * width, shards.slots, self._back)
            self._signal(rank, "returned", group, self._calls, self._back)
        return self._back.record()

    def _lay_beside(self, out: DeviceArray, group: int) -> None:
        """Enqueues the writing of a group's channels, of all ranks, into [own rows, channels]."""
        shards, layout = self.shards, self._layout
        pieces = Pieces(
            rows=shards.slots * shards.share,
            share=shards.share,
            filled=len(shards.tokens_of(self._rank)),
            count=shards.ranks,
            width=shards.groups[group] * layout.token,
            step=shards.heads_each * layout.token,
            first=sum(shards.groups[:group]) * layout.token,
            whole=shards.heads * layout.token,
        )
        self.memory.lay_beside(out.address, self.memory.address(self._rank) + layout.piece(0, group), pieces)

    def _heads(self, rank: int, group: int) -> range:
        """The heads of a rank's group, without padding."""
        start = sum(self.shards.groups[:group])
        return self.shards.heads_of(rank)[start : start + self.shards.groups[group]]

    def _let_write(self) -> None:
        """Others may write into the own block after the compute stream's work, and `_send` into theirs."""
        self._ready += 1
        for rank in self._others:
            self._signal(rank, "ready", 0, self._ready, self._gpu.stream)
        for rank in self._others:
            self.memory.wait(self._flag("ready", rank), self._ready, self._send)
        self._joined = False

    def _follow(self, *sides: Any) -> None:
        """Side streams go on when the compute stream has come here."""
        event = self._gpu.stream.record()
        for side in sides:
            side.wait(event)

    def _await(self, what: str, group: int) -> None:
        for rank in self._others:
            self.memory.wait(self._flag(what, rank, group), self._calls, self._gpu.stream)

    def _signal(self, rank: int, what: str, group: int, value: int, stream: Any) -> None:
        if rank != self._rank:
            self.memory.signal(rank, self._flag(what, self._rank, group), value, stream)

    def _flag(self, what: str, source: int, group: int = 0) -> int:
        """The flag that rank `source` sets."""
        groups = len(self.shards.groups)
        first = {"ready": 0, "joined": 1, "given": 2, "returned": 2 + groups}[what]
        return source * (2 + 2 * groups) + first + group


def flags_of(shards: Shards) -> int:
    return shards.ranks * (2 + 2 * len(shards.groups))


class _Layout:
    """Places in a block, in bytes."""

    def __init__(self, shards: Shards, itemsize: int) -> None:
        self.token = shards.head_dim * itemsize  # bytes of a token of one head
        assert self.token % VECTOR == 0, f"{shards.head_dim} channels of {itemsize} bytes"
        tokens, rows = shards.slots * shards.slot_tokens, shards.slots * shards.share
        widths = [heads * self.token for heads in shards.groups]
        self._pieces = [rows * width for width in widths]
        parts = {f"{name} {group}": tokens * width for group, width in enumerate(widths) for name in NAMES}
        if shards.to_rows:
            parts["rows"] = rows * shards.heads * self.token
        else:
            parts |= {f"pieces {group}": shards.ranks * size for group, size in enumerate(self._pieces)}
        self._offsets, self.size = laid_out(parts)

    def at(self, name: str, group: int) -> int:
        return self._offsets[f"{name} {group}"]

    @property
    def rows(self) -> int:
        """The attended rows of the own tokens, with `to_rows`."""
        return self._offsets["rows"]

    def piece(self, source: int, group: int) -> int:
        """The attended rows from a group of rank `source`."""
        return self.at("pieces", group) + source * self._pieces[group]
