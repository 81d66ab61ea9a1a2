"""The hash of each exported graph, without names and versions that only torch's exporter decides.

    python tests/graph_hashes.py        writes tests/golden/graph_hashes.json, after GRAPHS_VERSION was raised

The graphs are those of the tiny model, in fp32, in fp8 (which has bf16 graphs too) and in int8, and of a
small SAM2 in fp16; Lynx's are those of the tiny model.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import numpy_helper
from tiny_job import PLAN

from trt_wan.build.export import export
from trt_wan.build.sam2 import export_sam2
from trt_wan.engines import contracts
from trt_wan.engines.config import TINY
from trt_wan.engines.lynx import FacePlan, Kind, LynxPlan
from trt_wan.engines.precision import Precision
from trt_wan.engines.sam2 import contracts as sam2_contracts
from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Plan
from trt_wan.engines.shape import CameraPlan

PINNED = Path(__file__).parent / "golden" / "graph_hashes.json"
VERSIONS = {
    "wan": contracts.GRAPHS_VERSION,
    "uni3c": contracts.GRAPHS_VERSION,
    "sam2": sam2_contracts.GRAPHS_VERSION,
    "lynx": contracts.LYNX_GRAPHS_VERSION,
}
# One block per stage, one of them global, one layer of memory attention: every kind of layer once.
SAM2 = replace(
    SAM2_MODELS["sam2.1_tiny"], image_size=256, blocks=(1, 1, 2, 1), global_blocks=(3,), memory_layers=1
)
SAM2_PLAN = Sam2Plan("fp16", batch=2, memories=(7,))
WAN_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp8", "int8")


Ready = Mapping[Precision, Path]  # folders with graphs that are made already
EMPTY: Ready = MappingProxyType({})


def wan_hashes(folder: Path, ready: Ready = EMPTY) -> Iterator[tuple[str, str]]:
    """By precision and network; a network that 8 bits leave as it was comes once."""
    seen = set()
    for precision in WAN_PRECISIONS:
        plan = replace(PLAN, precision=precision)
        for name, network in contracts.networks(TINY, plan).items():
            if network not in seen:
                seen.add(network)
                if precision in ready:
                    path = ready[precision] / f"{name}.onnx"
                else:
                    export(network, TINY, plan, path := folder / f"{precision}-{name}.onnx")
                yield f"{precision} {name}", graph_hash(path)


def uni3c_hashes(folder: Path, ready: Ready = EMPTY) -> Iterator[tuple[str, str]]:
    seen = set()
    for precision in WAN_PRECISIONS:
        plan = CameraPlan.beside(replace(PLAN, precision=precision), TINY.camera.ffn_dim)
        for name, network in contracts.networks(TINY, plan).items():
            if network not in seen:
                seen.add(network)
                export(network, TINY, plan, path := folder / f"{precision}-{name}.onnx")
                yield f"{precision} {name}", graph_hash(path)


def lynx_hashes(folder: Path, ready: Ready = EMPTY) -> Iterator[tuple[str, str]]:
    """Those of Lynx's own networks; the others of a FacePlan are the transformer's, at another size."""
    seen = set()
    kinds: tuple[Kind, ...] = ("full", "lite")
    for precision in WAN_PRECISIONS:
        plan = replace(PLAN, precision=precision)
        plans = (*(LynxPlan.of(plan, kind) for kind in kinds), FacePlan(precision=precision))
        for shape in plans:
            for name, network in contracts.networks(TINY, shape).items():
                if network not in seen and name.startswith("lynx"):
                    seen.add(network)
                    kind = f" {shape.kind}" if isinstance(shape, LynxPlan) else ""
                    export(network, TINY, shape, path := folder / f"{precision}-{name}{kind}.onnx")
                    yield f"{precision} {name}{kind}", graph_hash(path)


def sam2_hashes(folder: Path, ready: Ready = EMPTY) -> Iterator[tuple[str, str]]:
    for name, network in sam2_contracts.networks(SAM2, SAM2_PLAN).items():
        export_sam2(network, SAM2, path := folder / f"{name}.onnx")
        yield name, graph_hash(path)


def graph_hash(path: Path) -> str:
    """Covers operators, attributes, constants, and how they are connected; inputs and outputs by name."""
    model = onnx.load(path)
    graph = model.graph
    assert not model.functions, "functions are not hashed yet"
    names = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    parts: list[object] = [sorted((o.domain, o.version) for o in model.opset_import)]
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        parts.append((value.name, kind.elem_type, [d.dim_value for d in kind.shape.dim]))
    for i, constant in enumerate(graph.initializer):
        names.setdefault(constant.name, f"constant {i}")
        parts.append((names[constant.name], _constant(constant)))
    for i, node in enumerate(graph.node):
        for j, output in enumerate(node.output):
            names.setdefault(output, f"{i}.{j}")
        attributes = sorted((a.name, _attribute(a)) for a in node.attribute)
        parts.append((node.domain, node.op_type, attributes))
        parts.append([[names[name] for name in ends] for ends in (node.input, node.output)])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _attribute(attribute: onnx.AttributeProto) -> str:
    assert attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS), "not hashed yet"
    if attribute.type == onnx.AttributeProto.TENSOR:
        return repr(_constant(attribute.t))
    return repr(onnx.helper.get_attribute_value(attribute))


def _constant(tensor: onnx.TensorProto) -> tuple[int, list[int], str]:
    values = numpy_helper.to_array(tensor)
    if values.dtype in (np.float32, np.float64):  # the last bits of a power differ between processors
        mantissas, exponents = np.frexp(np.nan_to_num(values))
        values = np.stack([np.rint(mantissas * 2**16).astype(np.int64), exponents.astype(np.int64)])
    return tensor.data_type, list(tensor.dims), hashlib.sha256(values.tobytes()).hexdigest()


HASHES = {"wan": wan_hashes, "uni3c": uni3c_hashes, "sam2": sam2_hashes, "lynx": lynx_hashes}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {
            kind: {"version": VERSIONS[kind], "graphs": dict(hashes(Path(folder)))}
            for kind, hashes in HASHES.items()
        }
    PINNED.write_text(json.dumps(found, indent=1) + "\n")
    print(PINNED)
