"""Whether two versions of the package compute the same, to the bit: digests of everything the embedded models give.

    python -m benchmarks.equal_logits --write before.json       # in the checkout of one version
    python -m benchmarks.equal_logits --against before.json     # in that of the other; exits 1 if anything differs

Both on one machine, as kernels are chosen by the machine. For versions that lack this file it is run by its path, with
`optimum_fp8` and its compiled kernels in CHECKOUT:

    PYTHONPATH=CHECKOUT python benchmarks/equal_logits.py --write before.json

It takes about a minute on two cores. Where they are shared with other programs, OMP_WAIT_POLICY=passive in the
environment keeps waiting threads from taking the time of working ones.

A combination is a model and a configuration: every scale method with every activation scheme on every target, then
attention and caches, E5M2, other dtypes, the reference operators, and models that are saved and loaded. Digests are
those of logits, of generated tokens, of FP8 weights, of scales, and of what is measured and saved. Only the public
interface is used, so that versions can be compared that share nothing else.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import optimum_fp8
from optimum_fp8 import FP8Config, calibrate, convert, finalize_calibration, ops, prepare
from optimum_fp8.errors import FP8Error
from optimum_fp8.scales import INC_METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDERS = {
    "tiny_lm": EXAMPLES / "llm" / "tiny_lm",
    "tiny_vit": EXAMPLES / "vision" / "tiny_vit",
    "tiny_resnet": EXAMPLES / "vision" / "tiny_resnet",
}
TARGETS = ("gaudi2", "gaudi3", "cuda", "cpu")
SCHEMES = ("static", "dynamic", "weight_only")
PER_CHANNEL = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
THREADS, TOKENS, SAMPLES = 2, 32, 4

Digests = dict[str, str]


@dataclass(frozen=True)
class Combination:
    """A model, the configuration it is quantized by, and how.

    Attributes:
        model: a key of `FOLDERS`.
        options: of FP8Config.
        dtype: of the model.
        backend: that is forced, or "free".
        loaded: quantize in `from_pretrained`, then save, and load again for the given target.
    """

    model: str
    options: dict[str, Any]
    dtype: str = "bfloat16"
    backend: str = "free"
    loaded: str = ""

    def __str__(self) -> str:
        how = {"dtype": self.dtype, "backend": self.backend, "loaded": self.loaded}
        return " ".join([self.model, *(f"{key}={value}" for key, value in {**self.options, **how}.items() if value)])


def product(**choices: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each key."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def combinations() -> Iterator[Combination]:
    """All that is compared."""
    for model in FOLDERS:
        for options in product(scale_method=INC_METHODS, activation_scheme=SCHEMES, target=TARGETS):
            yield Combination(model, options)
        for options in product(fp8_config=["E5M2"], activation_scheme=SCHEMES, target=["gaudi2", "cpu"]):
            yield Combination(model, options)
        yield from _variations(model)
    yield from _attention()
    for model in FOLDERS:
        for options in product(activation_scheme=SCHEMES, target=["gaudi2", "cpu"]):
            yield Combination(model, options, loaded="gaudi3")
    for scheme in ("static", "dynamic"):
        options = {"activation_scheme": scheme, "target": "cpu", "attention": True, "kv_cache": True}
        for granularity in ("tensor", "head"):
            yield Combination("tiny_lm", options | {"attention_granularity": granularity}, loaded="gaudi2")


def _variations(model: str) -> Iterator[Combination]:
    """Keys, dtypes and backends that are independent of the rest: each by itself."""
    static = {"activation_scheme": "static", "target": "cpu"}
    for key, value in {
        "hp_dtype": "fp32",
        "input_backoff": 0.9,
        "weight_backoff": 0.9,
        "quantize_lm_head": True,
        "use_qdq": True,
        "scale_format": "const",
    }.items():
        for scheme in ("static", "dynamic"):
            yield Combination(model, static | {"activation_scheme": scheme, key: value})
    for dtype, scheme in itertools.product(("float32", "float16"), SCHEMES):
        yield Combination(model, static | {"activation_scheme": scheme}, dtype=dtype)
    for scheme, target in itertools.product(SCHEMES, ("gaudi2", "cpu")):
        options = {"activation_scheme": scheme, "target": target, "scale_method": PER_CHANNEL}
        yield Combination(model, options, backend="reference")


def _attention() -> Iterator[Combination]:
    """Attention and caches of the language model, with generation where there is a cache; attention of the other."""
    both = {"attention": [True], "kv_cache": [True], "activation_scheme": ["static", "dynamic"]}
    kinds = {"attention_granularity": ["tensor", "head"], "attention_dataflow": ["fused", "unfused"]}
    for options in product(**both, **kinds, use_qdq=[False, True], target=TARGETS):
        yield Combination("tiny_lm", options)
    for options in product(**both, scale_method=INC_METHODS, target=["gaudi2", "cpu"]):
        yield Combination("tiny_lm", options)
    for options in product(**both, attention_granularity=["head"], fp8_config=["E5M2"], target=["gaudi2", "cpu"]):
        yield Combination("tiny_lm", options)
    for options in product(**both, softmax_backoff=[0.5], target=["cpu"]):
        yield Combination("tiny_lm", options)
    for options in product(**both, **kinds, target=["gaudi2", "cpu"]):
        yield Combination("tiny_lm", options, backend="reference")
    for options in product(kv_cache=[True], activation_scheme=SCHEMES, attention_granularity=["tensor", "head"]):
        yield Combination("tiny_lm", options | {"target": "cpu"})
    alone = {"attention": [True], "activation_scheme": ["static", "dynamic"], **kinds, "target": ["gaudi2", "cpu"]}
    for model, options in itertools.product(("tiny_lm", "tiny_vit"), product(**alone)):
        yield Combination(model, options)


# --- models and what goes in ------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """An embedded model in high precision, what it is calibrated with and what it is given."""

    name: str
    folder: Path
    calibration: list[dict[str, torch.Tensor]] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, name: str) -> Subject:
        made = cls(name, FOLDERS[name])
        if name == "tiny_lm":
            tokenizer = AutoTokenizer.from_pretrained(made.folder)
            samples = [_token_ids(tokenizer, made.folder / f"{part}.txt") for part in ("calibration", "heldout")]
            made.calibration = [{"input_ids": ids[None]} for ids in samples[0]]
            mask = torch.ones_like(samples[1])
            mask[1, : TOKENS // 4] = 0
            made.inputs = {"input_ids": samples[1], "attention_mask": mask}
        else:
            pixels = torch.randn(SAMPLES + 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            made.calibration = [{"pixel_values": image[None]} for image in pixels[2:]]
            made.inputs = {"pixel_values": pixels[:2]}
        return made

    def load(self, folder: Path, **options: Any) -> Any:
        kind = AutoModelForCausalLM if self.name == "tiny_lm" else AutoModelForImageClassification
        return kind.from_pretrained(folder, **options).eval()

    def copy(self, dtype: str) -> Any:
        """A fresh copy of the model in high precision."""
        if dtype not in self.models:
            self.models[dtype] = self.load(self.folder, dtype=getattr(torch, dtype))
        return copy.deepcopy(self.models[dtype])

    def batches(self, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
        return [_cast(batch, dtype) for batch in self.calibration]


def _token_ids(tokenizer: Any, path: Path) -> torch.Tensor:
    ids = tokenizer(path.read_text(encoding="utf-8")[:4000], return_tensors="pt", verbose=False).input_ids[0]
    return ids[: SAMPLES * TOKENS].view(SAMPLES, TOKENS)


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}


# --- digests ----------------------------------------------------------------------------------------------------------


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes, in whatever order they come."""
    lines = []
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


@torch.no_grad()
def outputs(model: Any, subject: Subject, generates: bool) -> Digests:
    """Digests of logits, and of what is generated from the first half of the tokens."""
    inputs = _cast(subject.inputs, model.dtype)
    found = {"logits": digest([("logits", model(**inputs).logits)])}
    if generates:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        prompt = {key: value[:2, : TOKENS // 2] for key, value in inputs.items()}
        answer = model.generate(**prompt, **options, output_logits=True, return_dict_in_generate=True)
        found["generated"] = digest([("tokens", answer.sequences), ("logits", torch.stack(answer.logits))])
    return found


def state(model: Any) -> Digests:
    """Digests of scales and FP8 weights, by the last part of their names: where a module keeps them may change."""
    tensors = [(name.rpartition(".")[2], value) for name, value in (*model.named_parameters(), *model.named_buffers())]
    codes = [(name, value) for name, value in tensors if value.is_floating_point() and value.element_size() == 1]
    return {"scales": digest((name, value) for name, value in tensors if "scale" in name), "weights": digest(codes)}


def saved(folder: Path) -> str:
    """Of all tensors of a checkpoint, by their whole names."""
    return digest(pair for path in folder.glob("*.safetensors") for pair in load_file(path).items())


# --- running ----------------------------------------------------------------------------------------------------------


class Runner:
    """Computes digests of combinations; models are measured once for each dtype."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.subjects = {name: Subject.make(name) for name in FOLDERS}
        self.measured: Digests = {}

    def run(self, combination: Combination) -> Digests:
        """Digests of one combination; the kind of error where a configuration is refused."""
        try:
            with nullcontext() if combination.backend == "free" else ops.backend(combination.backend):
                return self._loaded(combination) if combination.loaded else self._converted(combination)
        except FP8Error as error:
            return {"refused": type(error).__name__}

    def _converted(self, combination: Combination) -> Digests:
        subject, options = self.subjects[combination.model], dict(combination.options)
        options["dump_stats_path"] = str(self.folder / f"{combination.model}-{combination.dtype}")
        config = FP8Config(**options)
        self._measure(subject, combination.dtype, options["dump_stats_path"])
        model = convert(subject.copy(combination.dtype), config)
        return outputs(model, subject, generates=config.kv_cache) | state(model)

    def _measure(self, subject: Subject, dtype: str, path: str) -> None:
        """Leave the ranges of all that may be quantized at `path`."""
        if path in self.measured:
            return
        model = subject.copy(dtype)
        language = {"attention": True, "kv_cache": True} if subject.name == "tiny_lm" else {}
        options = {"attention": subject.name == "tiny_vit", **language, "quantize_lm_head": True}
        batches = subject.batches(model.dtype)
        config = FP8Config(activation_scheme="static", target="cpu", dataset=batches, dump_stats_path=path, **options)
        finalize_calibration(calibrate(prepare(model, config)))
        file = next(self.folder.glob(f"{Path(path).name}*.safetensors"))
        self.measured[path] = digest(load_file(file).items())

    def _loaded(self, combination: Combination) -> Digests:
        subject, options, dtype = self.subjects[combination.model], dict(combination.options), combination.dtype
        if options["activation_scheme"] == "static":
            options["dataset"] = subject.batches(getattr(torch, dtype))
        generates = options.get("kv_cache", False)
        config = FP8Config(**options, dump_stats_path=str(self.folder / "unused"))
        model = subject.load(subject.folder, dtype=getattr(torch, dtype), quantization_config=config)
        found = outputs(model, subject, generates) | state(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found["saved"] = saved(Path(folder))
            again = outputs(subject.load(Path(folder)), subject, generates)
            found |= {f"{key}, loaded": value for key, value in again.items()}
            other = subject.load(Path(folder), quantization_config=FP8Config(target=combination.loaded))
            found |= {
                f"{key}, {combination.loaded}": value for key, value in outputs(other, subject, generates).items()
            }
        return found


def compute(only: str) -> dict[str, Digests]:
    """Digests of all combinations whose description holds `only`."""
    found: dict[str, Digests] = {}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(folder)
        for combination in combinations():
            if only in str(combination):
                found[str(combination)] = runner.run(combination)
        found |= {f"{Path(path).name} measured": {"ranges": ranges} for path, ranges in runner.measured.items()}
    return found | {"machine": machine()}


def machine() -> Digests:
    """What decides which kernels of torch run, and how."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def differences(found: dict[str, Digests], expected: dict[str, Digests]) -> list[str]:
    """One line for each combination that differs, or that only one side has."""
    lines = []
    for name in sorted(found.keys() | expected.keys()):
        mine, others = found.get(name, {}), expected.get(name, {})
        unequal = sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key))
        if not mine or not others:
            lines.append(f"{name}: only {'here' if mine else 'there'}")
        elif unequal:
            lines.append(f"{name}: {'; '.join(unequal)}")
    return lines


def prepare_process() -> None:
    """A fixed number of threads, and nothing printed but the result."""
    torch.set_num_threads(THREADS)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="store the digests")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with stored digests")
    parser.add_argument("--only", default="", help="combinations whose description holds this text")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    found = compute(options.only)
    print(f"{len(found)} combinations of {optimum_fp8.__file__} in {time.perf_counter() - started:.0f} s")
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    if not options.against:
        return 0
    expected = json.loads(options.against.read_text())
    lines = differences(
        found, {name: value for name, value in expected.items() if name in found or options.only in name}
    )
    print("\n".join([*lines, f"{len(lines)} combinations differ"]))
    return 1 if lines else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
