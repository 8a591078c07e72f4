"""Products of one input in a graph that inductor compiles, computed in one go.

They are found when the first of them is lowered, and take its place together; their dynamic scales, which are that
input's own, are one. Nothing between them may change in place what they are computed from: inductor, which puts changes
back in place that tracing has taken apart, lets one node stand for a tensor before and after.
"""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any

import torch
from torch.fx.node import map_arg

Node = Any  # torch.fx.Node: its arguments can be of so many types that each use would have to tell which
Known = dict[Any, Any]

_MOST = 8  # products that are computed together
_KEPT = "optimum_fp8_output"


def register(lowering: ModuleType) -> None:
    """Tell `torch._inductor.lowering` how `linear` and `dynamic_scale` are lowered. Where it is not as we know it,
    graphs are compiled as they are: each product by itself."""
    if not (hasattr(lowering, "fallback_handler") and hasattr(lowering, "register_lowering")):
        return
    from torch._inductor.virtualized import V

    operators = torch.ops.optimum_fp8
    product, scale = operators.linear.default, operators.dynamic_scale.default
    call_product, call_products = (lowering.fallback_handler(op) for op in (product, operators.linears.default))
    call_scale = lowering.fallback_handler(scale)

    def linear(*args: Any) -> Any:
        graph: Any = V.graph
        node: Node = graph.current_node
        made_in, output = node.meta.pop(_KEPT, (None, None))
        if made_in is graph:
            return output
        others = [other for other in node.args[0].users if _goes_with(other, node, graph.env)][: _MOST - 1]
        if not others:
            return call_product(*args)
        rest = [map_arg(other.args, lambda operand: graph.env[_equal(operand, graph.env)]) for other in others]
        _, weights, weight_scales, input_scales, biases, _, _, owners = zip(args, *rest, strict=True)
        each = (list(weights), list(weight_scales), list(input_scales), list(biases))
        outputs = call_products(args[0], *each, *args[5:7], list(owners))
        for other, output in zip(others, outputs[1:], strict=True):
            other.meta[_KEPT] = (graph, output)
        return outputs[0]

    def dynamic_scale(*args: Any) -> Any:
        graph: Any = V.graph
        equal = _equal(graph.current_node, graph.env)
        return call_scale(*args) if equal is None else graph.env[equal]

    lowering.register_lowering(product, type_promotion_kind=None)(linear)
    lowering.register_lowering(scale, type_promotion_kind=None)(dynamic_scale)


def _goes_with(other: Node, node: Node, known: Known) -> bool:
    """Whether the product `other` can be computed when `node` is: it is still to come, and all it needs is there."""
    if other is node or other in known or other.target is not node.target or other.args[0] is not node.args[0]:
        return False
    if other.args[5:7] != node.args[5:7] or any(_equal(operand, known) is None for operand in other.all_input_nodes):
        return False
    return _unchanged_between(node, other)


def _equal(node: Node, known: Known) -> Node:
    """The node itself if it is known, or, of a dynamic scale, one that is and computes the same; else None."""
    if node in known:
        return node
    if node.target is not torch.ops.optimum_fp8.dynamic_scale.default:
        return None
    alike = (other for other in node.args[0].users if other.target is node.target and other.args == node.args)
    return next((other for other in alike if other in known and _unchanged_between(other, node)), None)


def _unchanged_between(first: Node, last: Node) -> bool:
    """Whether `last` comes after `first`, and nothing from there can have changed in place what it is computed from."""
    needed = {_storage(operand) for operand in last.all_input_nodes}
    while (first := first.next) is not last:
        if first.op == "output":
            return False
        if first.op != "call_function" or getattr(first.target, "__module__", None) == operator.getitem.__module__:
            continue  # items of lists, arithmetic on sizes
        if not isinstance(first.target, torch._ops.OpOverload):
            return False
        if first.target._schema.is_mutable and not needed.isdisjoint(map(_storage, first.all_input_nodes)):
            return False
    return True


def _storage(node: Node) -> Any:
    """What nodes have in common whose tensors share memory."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node
