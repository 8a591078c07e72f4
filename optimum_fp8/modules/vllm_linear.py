"""vLLM's linear layers in FP8, which vLLM for Gaudi has as well.

They return an output and a bias, which whoever calls them adds (`skip_bias_add`), or the output alone (`return_bias`).
`MergedColumnParallelLinear` and `QKVParallelLinear` hold the weights of several layers with the same input, one below
the other; they have one input scale.
"""

from __future__ import annotations

from typing import Any

import torch

from ..measure import Observers
from ..scales import Scheme
from .all_reduce import Peers
from .handler import Target, register_handler
from .linear import FP8LinearBase
from .parallel import FP8RowParallel, ParallelHandler, RowParallelHandler, imported


def vllm_peers(module: Any) -> Peers:
    """The processes that hold the parts of a layer of vLLM's."""
    count, rank = getattr(module, "tp_size", None), getattr(module, "tp_rank", None)
    if count is None:  # of older versions: layers ask for it when they are called
        ask = imported(module, "get_tensor_model_parallel_world_size")
        count = ask() if ask else 1
    if count == 1:
        return Peers()
    if rank is None:
        ask = imported(module, "get_tensor_model_parallel_rank")
        rank = ask() if ask else 0
    reduce, gather = (imported(module, f"tensor_model_parallel_{name}") for name in ("all_reduce", "all_gather"))
    # The file of that function knows the group.
    group = getattr(reduce, "__globals__", {}).get("get_tp_group")
    return Peers(count, rank, getattr(group(), "device_group", None) if group else None, reduce, gather)


def _lacking(module: Any) -> str | None:
    """Why a module of one of these names is not vLLM's, or None."""
    if not callable(getattr(getattr(module, "quant_method", None), "apply", None)):
        return "it has no quant_method, as vLLM's layers do"
    return None


def _lacking_bias(module: Any) -> str | None:
    return _lacking(module) or (None if hasattr(module, "skip_bias_add") else "it has no skip_bias_add")


def _added_bias(module: Any) -> torch.Tensor | None:
    return None if module.skip_bias_add else module.bias


def _returned(module: Any, output: torch.Tensor) -> Any:
    if not getattr(module, "return_bias", True):
        return output
    return output, module.bias if module.skip_bias_add else None


class FP8ReplicatedLinear(FP8LinearBase):
    """A layer that every process holds as a whole."""

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return _returned(self, self.product(x, _added_bias(self)))


class FP8ColumnParallelLinear(FP8LinearBase):
    """A layer split by columns, with an FP8 weight `[out / processes, in]`."""

    def forward(self, input_: torch.Tensor) -> Any:  # type: ignore[override]
        output = self.product(input_, _added_bias(self))
        return _returned(self, vllm_peers(self).all_gather(output) if self.gather_output else output)


class FP8RowParallelLinear(FP8RowParallel):
    """A layer split by rows, with an FP8 weight `[out, in / processes]`."""

    @staticmethod
    def peers(module: Any) -> Peers:
        return vllm_peers(module) if module.reduce_results else Peers()

    @staticmethod
    def own_part(module: Any, x: torch.Tensor) -> torch.Tensor:
        if module.input_is_parallel:
            return x
        peers = vllm_peers(module)
        width = x.shape[-1] // peers.count
        return x.narrow(-1, peers.rank * width, width).contiguous()

    @staticmethod
    def added_bias(module: Any) -> torch.Tensor | None:
        # Where results are added up by others, one process adds the bias.
        return None if not module.reduce_results and vllm_peers(module).rank else _added_bias(module)

    @staticmethod
    def original_product(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.quant_method.apply(module, x, None)  # type: ignore[no-any-return]

    @staticmethod
    def returned(module: Any, output: torch.Tensor) -> Any:
        return _returned(module, output)

    def forward(self, input_: torch.Tensor) -> Any:  # type: ignore[override]
        return self.computed(input_)


class FP8ParallelLMHead(FP8LinearBase):
    """The output head, split by columns: it is never called, but the `apply` of its `quant_method` is."""

    def __init__(self, origin: Any, scheme: Scheme):
        super().__init__(origin, scheme)
        for each in (self, self.origin):
            method = vars(each)["quant_method"]
            vars(each)["quant_method"] = method._method if isinstance(method, MeasuredMethod) else method

    @property
    def quant_method(self) -> HeadMethod:
        return HeadMethod(self.__dict__["quant_method"])

    def forward(self, input_: torch.Tensor) -> Any:  # type: ignore[override]
        return type(self.origin).forward(self, input_)  # says that it is not to be called


class HeadMethod:
    """The `quant_method` of a head in FP8: what the head's own has, apart from the product."""

    def __init__(self, method: Any):
        self._method = method

    def apply(self, layer: FP8LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[…, out / processes]` of an input `[…, in]`."""
        return layer.product(x, bias)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying asks before there is anything
            raise AttributeError(name)
        return getattr(self._method, name)


class MeasuredMethod(HeadMethod):
    """The `quant_method` of a head that is measured."""

    def __init__(self, method: Any, name: str, observers: Observers, module: Any):
        super().__init__(method)
        self._name, self._observers, self._module = name, observers, module

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As the head's own, which is observed."""
        observers = self._observers
        if "input" in observers.kinds:
            observers.observe(self._name, "input", x)
        output: torch.Tensor = self._method.apply(layer, x, bias)
        if "output" in observers.kinds:
            observers.observe(self._name, "output", output)
        return output

    def remove(self) -> None:
        """Put the head's own back."""
        self._module.quant_method = self._method


class HeadHandler(ParallelHandler):
    """Output heads, whose products are taken by their `quant_method`."""

    def observe(self, target: Target, observers: Observers) -> None:
        observers.attach_weight(target.name, target.module)
        if target.scheme.needs_ranges:
            module: Any = target.module
            module.quant_method = MeasuredMethod(module.quant_method, target.name, observers, module)
            observers.add(module.quant_method)


_COLUMNS = ("ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear")

for _handler in (
    HeadHandler("vLLM head", ("ParallelLMHead",), FP8ParallelLMHead, vllm_peers, _lacking),
    ParallelHandler("vLLM replicated", ("ReplicatedLinear",), FP8ReplicatedLinear, vllm_peers, _lacking_bias),
    ParallelHandler("vLLM columns", _COLUMNS, FP8ColumnParallelLinear, vllm_peers, _lacking_bias),
    RowParallelHandler("vLLM rows", ("RowParallelLinear",), FP8RowParallelLinear, vllm_peers, _lacking_bias),
):
    register_handler(_handler)
