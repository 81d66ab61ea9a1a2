"""Convolutions of channels-last bf16 pictures, by cuDNN's precompiled kernels.

x is [frames, height, width, channels], w is [out, t, r, s, inner], y is like x. Sums are float32. Time is
never padded: a causal convolution gets two more frames than it returns.
"""

from dataclasses import dataclass
from typing import Any

from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments import cudnn_library

# Names of cuDNN's plans that are faster than the first of its heuristics, by the channels of x and y and the
# kernel: of some thirty plans, measured on an H200 with cuDNN 9.19 at 832x480 and 1280x720 (docs/log.md).
_WIDE, _NARROW = "eng62_k2=0_k13=1_k18=0_k25=1_k27=8_k28=1", "eng62_k2=4_k13=0_k18=0_k25=0_k27=1_k28=3"
FASTER = {
    (96, 96, (3, 3, 3)): "eng62_k2=0_k13=0_k18=0_k25=0_k27=8_k28=1",
    (96, 192, (3, 3, 3)): _NARROW,
    (192, 384, (3, 3, 3)): _WIDE,
    (384, 384, (3, 3, 3)): _WIDE,
    (384, 192, (1, 3, 3)): _NARROW,
}


@dataclass(frozen=True)
class ConvShape:
    """`frames`, `height` and `width` are of the result. The order of three is time, height, width. `pad` is
    the zeros around each picture: rows above and below, columns to the left and to the right.
    """

    frames: int
    height: int
    width: int
    inner: int
    out: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def taken(self) -> tuple[int, int, int]:
        """Frames, height and width of x."""
        t, y, x = (
            (size - 1) * stride + kernel
            for size, stride, kernel in zip(
                (self.frames, self.height, self.width), self.stride, self.kernel, strict=True
            )
        )
        return t, y - sum(self.pad[:2]), x - sum(self.pad[2:])

    @property
    def flops(self) -> int:
        t, r, s = self.kernel
        return 2 * self.frames * self.height * self.width * self.out * t * r * s * self.inner


def convolution(gpu: Gpu, shape: ConvShape) -> "CudnnConvolution":
    """The convolution of that shape, built once per Gpu."""
    return gpu.once(shape, lambda: CudnnConvolution(gpu, shape))


class CudnnConvolution:
    """The plan is the one in FASTER, or the first of cuDNN's heuristics, the same every time. No plan needs a
    compiler.

    Raises EnvironmentBroken if cuDNN has none for this GPU.
    """

    def __init__(self, gpu: Gpu, shape: ConvShape) -> None:
        cudnn = cudnn_library.load()
        self._handle = cudnn_library.handle(gpu)
        self._graph = graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )
        (n, *size), (_, *made), kernel, stride, before, after = _axes(shape)
        self._x = _tensor(graph, "x", n, shape.inner, size)
        self._w = _tensor(graph, "w", shape.out, shape.inner, kernel)
        self._y = graph.conv_fprop(
            self._x,
            self._w,
            pre_padding=before,
            post_padding=after,
            stride=stride,
            dilation=[1] * len(stride),
        )
        dims, strides = _layout(n, shape.out, made)
        self._y.set_output(True).set_dim(dims).set_stride(strides).set_data_type(cudnn.data_type.BFLOAT16)
        graph.deselect_behavior_notes([cudnn.behavior_note.RUNTIME_COMPILATION])
        graph.deselect_numeric_notes([cudnn.numerical_note.NONDETERMINISTIC])
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
            graph.check_support()
            names = map(graph.get_plan_name_at_index, range(graph.get_execution_plan_count()))
            wanted = FASTER.get((shape.inner, shape.out, shape.kernel))
            faster = next((i for i, name in enumerate(names) if name == wanted), None)
            if faster is None:
                graph.build_plans()
            else:
                graph.build_plan_at_index(faster)
        except cudnn.cudnnGraphNotSupportedError as error:
            reason = " ".join(str(error).split())[:200]
            raise EnvironmentBroken(
                f"cuDNN {cudnn.backend_version_string()} has no such convolution for this GPU ({reason}).",
                "Use --segment vae_decode_next=tensorrt, and the same for the VAE's other networks.",
            ) from error
        self.workspace_bytes = int(graph.get_workspace_size())

    def enqueue(self, x: int, w: int, y: int, workspace: int) -> None:
        """Takes addresses on the device; the workspace has `workspace_bytes`."""
        self._graph.execute({self._x: x, self._w: w, self._y: y}, workspace, handle=self._handle)


def _axes(shape: ConvShape) -> tuple[Any, ...]:
    """(batch, size of x), (batch, size of y), kernel, stride, zeros before and after, with few axes.

    Frames are the batch where time is not convolved. Where time alone is, a picture is one row.
    """
    (t, r, s), (frames, height, width) = shape.kernel, shape.taken
    made = shape.frames, shape.height, shape.width
    before, after = [shape.pad[0], shape.pad[2]], [shape.pad[1], shape.pad[3]]
    if t == 1:
        return (frames, height, width), made, [r, s], list(shape.stride[1:]), before, after
    if r == s == 1:
        pixels = height * width
        stride = [shape.stride[0], 1]
        return (1, frames, pixels), (1, shape.frames, pixels), [t, 1], stride, [0, 0], [0, 0]
    whole = (1, frames, height, width), (1, *made)
    return *whole, [t, r, s], list(shape.stride), [0, *before], [0, *after]


def _layout(n: int, channels: int, size: list[int]) -> tuple[list[int], list[int]]:
    """Dimensions [n, channels, *size] and strides, the channels innermost."""
    strides: list[int] = []
    step = channels
    for extent in reversed(size):
        strides.insert(0, step)
        step *= extent
    return [n, channels, *size], [step, 1, *strides]


def _tensor(graph: Any, name: str, n: int, channels: int, size: list[int]) -> Any:
    dims, strides = _layout(n, channels, size)
    return graph.tensor(name=name, dim=dims, stride=strides)
