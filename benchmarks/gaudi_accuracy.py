"""What each scale method costs in accuracy on each target: perplexity and divergence of the embedded language model.

    python -m benchmarks.gaudi_accuracy            # measures, then writes the results, the tables and the picture
    python -m benchmarks.gaudi_accuracy --page     # writes tables and picture from the results that there are

Every scale method, static and dynamic, in both formats; then with attention and cache in FP8, and with outliers planted
(`observers.py`), as the embedded model has none worth the name. The targets "cuda" and "cpu" have the same numerics and
are measured once. It takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare
from optimum_fp8.scales import INC_METHODS, SCALE_METHODS

from . import gaudi_page
from .observers import Quality, Texts, loaded, log_probabilities, plant, quality

RESULTS = Path(__file__).parent / "results" / "gaudi-accuracy.json"
TARGETS = ("gaudi2", "gaudi3", "cpu")
FORMATS = ("E4M3", "E5M2")
OUTLIERS = (("none", 1), ("channel", 3000), ("spikes", 3000))
WITH_ATTENTION = ("maxabs_hw", "maxabs_pow2", "maxabs_arbitrary", "act_maxabs_pow2_weights_pcs_maxabs_pow2")
WINDOWS = 8


class Case(NamedTuple):
    """One way to quantize.

    Attributes:
        outliers: a kind that is planted, "none", "channel" or "spikes".
        attention: attention and its cache in FP8 too.
        fp8_config, scheme, method, target: keys of FP8Config.
    """

    outliers: str
    attention: bool
    fp8_config: str
    scheme: str
    method: str
    target: str

    def config(self, ranges: str) -> FP8Config:
        return FP8Config(
            mode="QUANTIZE",
            dump_stats_path=ranges,
            fp8_config=self.fp8_config,
            activation_scheme=self.scheme,
            scale_method=self.method,
            target=self.target,
            attention=self.attention,
            kv_cache=self.attention,
        )


def cases() -> Iterator[Case]:
    """All that is measured."""
    for outliers, _ in OUTLIERS:
        for fp8_config in FORMATS if outliers == "none" else FORMATS[:1]:
            for attention in (False, True) if outliers == "none" else (False,):
                for method in WITH_ATTENTION if attention else INC_METHODS:
                    for scheme in schemes(method):
                        for target in TARGETS:
                            yield Case(outliers, attention, fp8_config, scheme, method, target)


def schemes(method: str) -> list[str]:
    """How activations may be scaled with a method."""
    there = SCALE_METHODS[method]
    return [*(() if there.dynamic_only else ("static",)), *(("dynamic",) if there.activation.needs_range else ())]


class Subject:
    """The model with one kind of outliers: as it is in bfloat16, and its ranges, measured once."""

    def __init__(self, outliers: str, texts: Texts, ranges: str):
        self.texts, self.ranges = texts, ranges
        self.model = plant(loaded(), outliers, dict(OUTLIERS)[outliers], texts.calibration)
        self.expected = log_probabilities(self.model, texts.heldout)
        self.original = quality(self.expected, self.expected, texts.heldout)
        config = FP8Config(attention=True, kv_cache=True, decode_steps=0, dump_stats_path=ranges)
        measured = prepare(copy.deepcopy(self.model), config)
        for window in texts.calibration:
            measured(window[None])
        finalize_calibration(measured)

    def quality(self, case: Case) -> Quality:
        quantized = convert(copy.deepcopy(self.model), case.config(self.ranges))
        return quality(log_probabilities(quantized, self.texts.heldout), self.expected, self.texts.heldout)


def measure(wanted: Iterable[Case], windows: int) -> dict[str, Any]:
    """Perplexity and divergence of each case, and the perplexity in bfloat16 by kind of outliers."""
    texts, rows, original = Texts(windows), [], {}
    wanted = list(wanted)
    for outliers in dict.fromkeys(case.outliers for case in wanted):
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(outliers, texts, f"{folder}/ranges")
            original[outliers] = round(subject.original.perplexity, 4)
            for case in wanted:
                if case.outliers == outliers:
                    found = subject.quality(case)
                    numbers = {"perplexity": round(found.perplexity, 4), "divergence": float(f"{found.divergence:.4g}")}
                    rows.append(case._asdict() | numbers)
    return {"machine": machine() | {"windows": windows}, "bfloat16": original, "rows": rows}


def machine() -> dict[str, Any]:
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"processor": platform.machine(), "instructions": instructions, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 256 tokens, to calibrate on and to compare on")
    options = parser.parse_args()
    if not options.page:
        RESULTS.write_text(json.dumps(measure(cases(), options.windows), indent=1) + "\n", encoding="utf-8")
    gaudi_page.write(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
