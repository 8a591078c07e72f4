"""nn.LSTM, nn.GRU and nn.RNN with their weights in FP8; each call computes with the dequantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..scales import WEIGHT_ONLY, Scheme
from .handler import Surroundings, register_handler
from .named_weights import FP8NamedWeights
from .named_weights_handler import NamedWeightsHandler


class FP8Recurrent(FP8NamedWeights):
    """A recurrent layer whose matrices are held in FP8: `weight_ih_l0` `[gates · hidden, in]`, `weight_hh_l0`, ….

    torch's own function computes it, in high precision, with weights that are made in each call and gone afterwards.
    """

    def __init__(self, origin: Any, names: Any, scheme: Scheme):
        super().__init__(origin, names, scheme)
        for module in (self, self.origin):  # torch keeps its weights in a list as well
            module.__dict__.update(_without_weights(origin))

    def forward(self, input: Any, hx: Any = None) -> Any:
        acting: Any = object.__new__(type(self.origin))
        acting.__dict__.update(self.origin.__dict__)
        weights = [self._computed(name) for name in acting._flat_weights_names]
        acting.__dict__ |= {"_flat_weights": weights, "training": self.training}
        return type(acting).forward(acting, input, hx)

    def _computed(self, name: str) -> Any:
        if name in self.weight_names:
            return self.dequantized(name, self.high_precision, counts=True)
        return self._parameters[name]

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        module: Any = super().restored(dtype)
        module._init_flat_weights()
        return module  # type: ignore[no-any-return]


def _without_weights(module: Any) -> dict[str, list[None]]:
    none = [None] * len(module._flat_weights_names)
    return {"_flat_weights": none, "_flat_weight_refs": list(none)}


class RecurrentHandler(NamedWeightsHandler):
    """Recurrent layers of torch; nothing that goes into them is rounded."""

    kind = "recurrent"
    types = ("LSTM", "GRU", "RNN")
    classes = (nn.LSTM, nn.GRU, nn.RNN)
    fp8_class = FP8Recurrent

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # models that have none need not be told of them

    def weight_names(self, module: Any) -> tuple[str, ...]:
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))

    def may_have(self, name: str) -> bool:
        return name.startswith("bias_")

    def limit(self, module: Any, scheme: Scheme, around: Surroundings) -> tuple[dict[str, Any], str]:
        return {"activations": WEIGHT_ONLY}, ""


register_handler(RecurrentHandler())
