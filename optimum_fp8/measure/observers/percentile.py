"""The observer "percentile": a range that leaves out the largest values, however large they are."""

from __future__ import annotations

import torch

from ..histogram import HistogramObserver
from ..observer import register_observer


@register_observer
class Percentile(HistogramObserver):
    """The end of the bin up to which `context.percentile` percent of all values lie, zeros among them.

    It is max|x| where that bin holds it, and where the percentile would be 0.
    """

    name = "percentile"

    def range(self) -> torch.Tensor:
        maxabs = self._statistics["maxabs"]
        if not self.tells_more():
            return maxabs
        counts = self._statistics["counts"].double()
        last = int((counts.cumsum(0) < self.context.percentile / 100 * counts.sum()).sum())
        if last == 0:
            return maxabs
        end = torch.tensor(last + 1, dtype=torch.int16, device=maxabs.device) << 3
        return torch.minimum(end.view(torch.bfloat16).float(), maxabs)
