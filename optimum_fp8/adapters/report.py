"""What merging an adapter cost: how far the merged weights are from those that were trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..report.table import table

_ROWS = 12


@dataclass(frozen=True)
class MergedLayer:
    """One weight that the adapter changed; errors are ‖merged - exact‖ / ‖exact‖ over the whole matrix.

    Attributes:
        name: of its module.
        in_fp8: whether it is in FP8; if not, it is exact but for the rounding of its dtype.
        change: ‖delta‖ / ‖weight‖, with the weight that it was added to.
        rounding: the error of writing the sum in FP8, against the sum.
        error: of the merged weight against the one that was trained; None where that is not known.
        otherwise: the error of the other way (without the original, or with it); None where it is not known.
    """

    name: str
    in_fp8: bool
    change: float
    rounding: float
    error: float | None
    otherwise: float | None


@dataclass(frozen=True)
class MergeReport:
    """What became of a checkpoint that an adapter was merged into.

    Attributes:
        output: the folder of the merged checkpoint.
        trained_on: what the adapter was trained on, "base" or "fp8".
        from_original: whether it was added to the original weights, and not to those of the FP8 checkpoint.
        layers: the weights that it changed.
        static_scales: how many scales of activations the checkpoint keeps, which were found without the adapter.
    """

    output: str
    trained_on: str
    from_original: bool
    layers: tuple[MergedLayer, ...]
    static_scales: int

    def mean(self, of: Callable[[MergedLayer], float | None]) -> float | None:
        """The mean over the layers in FP8 for which it is known, or None."""
        known = [value for value in (of(each) for each in self.layers if each.in_fp8) if value is not None]
        return sum(known) / len(known) if known else None

    @property
    def loss(self) -> str | None:
        """What is lost by this way, in a sentence; None where it is no more than FP8 costs any model."""
        if not any(each.in_fp8 for each in self.layers) or (self.trained_on == "base" and self.from_original):
            return None
        error = _percent(self.mean(lambda each: each.error))
        if self.trained_on == "base":
            return (
                "the adapter was trained on the original weights and merged into their FP8 codes, so each weight is "
                f"rounded twice: the second time costs {_percent(self.mean(lambda each: each.rounding))} of its norm "
                "(mean of the layers), the first stays, and how much it was cannot be known here; give the original "
                "model (--original) to round once"
            )
        if self.from_original:
            return (
                "the adapter was trained on the FP8 weights and merged into the original ones, whose error it may make "
                f"up for: the result differs from what was trained by {error} (mean of the layers), without the "
                f"original it would by {_percent(self.mean(lambda each: each.otherwise))}"
            )
        return (
            f"the merged weights are rounded to FP8 again: they differ from what was trained by {error} (mean of the "
            "layers); keeping the adapter beside the FP8 model has no such loss"
        )

    def __str__(self) -> str:
        header = ("layer", "dtype", "change", "rounding", "error", "other way")
        worst = sorted(self.layers, key=lambda each: -(each.error if each.error is not None else each.rounding))
        rows = [
            (
                each.name,
                "FP8" if each.in_fp8 else "as it was",
                _percent(each.change),
                _percent(each.rounding),
                _percent(each.error),
                _percent(each.otherwise),
            )
            for each in worst[:_ROWS]
        ]
        more = [f"… and {len(worst) - _ROWS} more, with smaller errors"] if len(worst) > _ROWS else []
        way = "the original weights" if self.from_original else "the FP8 weights"
        said = [f"{len(self.layers)} weights changed, an adapter trained on {self.trained_on}, added to {way}"]
        if self.static_scales:
            said.append(
                f"{self.static_scales} scales of activations were kept, as they were calibrated without the adapter: "
                "where the merged model sees other ranges, calibrate it anew from the merged original"
            )
        lost = [f"loss: {self.loss}"] if self.loss else []
        return "\n".join([*table([header, *rows]), *more, *said, *lost, f"written to {self.output}"])


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f} %"
