"""Finds the first node of an ONNX graph whose result differs from a reference, by bisection."""

from collections.abc import Callable, Collection, Sequence

from onnx import ModelProto


def first_difference(
    graph: ModelProto, names: Collection[str], differs: Callable[[Sequence[str]], bool]
) -> str:
    """The name of the first node, in the graph's order, whose result differs; all its inputs are right.

    `names` are the tensors that can be compared. `differs` says whether any of the given ones differs; it is
    called about log2(n) times, with a half of the remaining tensors each time.
    """
    nodes = [(name, node.name) for node in graph.graph.node for name in node.output if name in names]
    if not nodes or not differs([name for name, _ in nodes]):
        return "no layer alone: with intermediate results as outputs the graph is right"
    low, high = 0, len(nodes)  # the results before `low` are right, one before `high` differs
    while high - low > 1:
        middle = (low + high) // 2
        if differs([name for name, _ in nodes[low:middle]]):
            high = middle
        else:
            low = middle
    return str(nodes[low][1])
