"""The whole flow for one pair: quantize while loading, run, generate, save, reload, dequantize, and compare."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from optimum_fp8 import FP8Config

from . import fake
from .build import Built, CannotBuild, build
from .eligible import called, codes_of, coverage, weights
from .inputs import cast, runs, tensors
from .pairs import Pair, loading_class

LEAST_SHARE, LARGEST_RATIO, LARGEST_ATTENTION = 0.9, 1.5, 0.3


@dataclass
class Row:
    """What became of one pair.

    Attributes:
        status: "pass"; "fail"; "nothing": it has no weight of a kind that becomes FP8, or only such as stay in high
            precision by default; "not built": transformers cannot build it, run it, or save and reload it here, at
            least not with what the census knows to ask for; "not run": it took too long.
        stage: where it failed.
        cause: why it failed.
        error: relative error of the outputs in FP8; `error_of_fake` of the independent quantization with the same
            scales; `error_with_attention` with attention and cache in FP8 too; `error_of_dequantized` afterwards.
        share: of the bytes of eligible weights, how many are in FP8.
    """

    model_type: str
    class_name: str
    autos: tuple[str, ...]
    status: str = "fail"
    stage: str = ""
    cause: str = ""
    dtype: str = ""
    inputs: tuple[str, ...] = ()
    parameters: int = 0
    share: float = 0.0
    eligible: int = 0
    unreached: int = 0
    by_default: int = 0
    left: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    error_of_fake: float = 0.0
    error_with_attention: float = 0.0
    error_of_dequantized: float = 0.0
    generates: str = ""
    seconds: float = 0.0


class TooSlow(BaseException):
    """A pair took too much of the processor's time."""


class Wrong(Exception):
    """Something ran and gave what it should not give."""


class Nothing(Exception):
    """No weight of a kind that becomes FP8 is there but those that stay in high precision by default."""


def census_row(pair: Pair) -> dict[str, Any]:
    """The row of a pair; never raises."""
    row, start = Row(*pair), time.perf_counter()
    try:
        built = _step(row, "build", lambda: build(pair))
        if not weights(built.model):
            raise Nothing(_kinds(built.model))
        _walk(row, pair, built)
        row.status, row.stage = "pass", ""
    except Nothing as error:
        row.status, row.cause = "nothing", str(error)
    except TooSlow as error:
        row.status, row.cause = "not run", f"{error}, at: {row.stage}"
    except CannotBuild as error:
        row.status, row.cause = "not built", str(error)[:700]
    except Exception as error:
        row.cause = row.cause or described(error)
    row.seconds = round(time.perf_counter() - start, 2)
    return asdict(row)


def described(error: BaseException) -> str:
    """An exception in one line: its class, its message, and where in the code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})"


def _kinds(model: Any) -> str:
    """The classes of the modules that hold a model's weights."""
    found = {
        type(module).__name__
        for module in model.modules()
        if any(each.ndim > 1 for each in module._parameters.values() if each is not None)
    }
    return f"its weights are in {', '.join(sorted(found)) or 'nothing'}"


def _step(row: Row, stage: str, do: Callable[[], Any]) -> Any:
    row.stage = stage
    return do()


@torch.no_grad()
def _walk(row: Row, pair: Pair, built: Built) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved, ours = f"{folder}/original", f"{folder}/fp8"
        _step(row, "save the original", lambda: built.model.save_pretrained(saved))
        model_class = loading_class(pair, built.model.config)
        dtype = _step(row, "reload the original", lambda: _runs_in(model_class, saved, built))
        model, batches = built.model.to(dtype), [cast(each, dtype) for each in built.batches]
        row.dtype, row.inputs = str(dtype).removeprefix("torch."), tuple(batches[0])
        row.parameters = sum(each.numel() for each in model.parameters())
        generates, cached = _generates(model, batches[0]), _caches(model, batches[0])
        load = loader(model_class, dtype)
        full = _step(row, "quantize", lambda: load(saved, batches, attention=True, kv_cache=cached))
        found = _step(row, "run in FP8", lambda: outputs(full, batches[0]))
        if generates:
            row.generates = _step(row, "generate", lambda: _generated(full, batches[0], generates))
        _step(row, "save", lambda: full.save_pretrained(ours))
        # transformers saves the dtype of the first weight, which some models keep in float32.
        given = {} if full.dtype == dtype else {"dtype": dtype}
        _step(row, "reload", lambda: _reloaded_equal(model_class, ours, batches[0], found, given))
        _cover(row, model, full, batches)
        layers = _step(row, "quantize layers alone", lambda: load(saved, batches))
        exact, other, third = (_plain(model_class, saved, each) for each in (torch.float32, dtype, dtype))
        expected = _step(row, "compare", lambda: _compare(row, exact, other, layers, full, batches[0]))
        fake.quantize_in_place(third, codes_of(full), round_inputs=False)
        _step(row, "dequantize", lambda: _dequantized(row, full, third, batches[0], expected))


def loader(model_class: Any, dtype: torch.dtype) -> Callable[..., Any]:
    """What quantizes a saved model while loading it, calibrated on batches."""

    def load(folder: str, batches: list[dict[str, Any]], **options: Any) -> Any:
        config = FP8Config(
            dataset=batches,
            num_calibration_samples=64,
            decode_steps=2,
            ignore_modules_wo_measures=True,
            **options,
        )
        return model_class.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()

    return load


def outputs(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """What a model returns for a batch, with the same random numbers each time."""
    torch.manual_seed(1)
    return tensors(model(**copy.deepcopy(batch)))


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square, over the tensors, of ‖found − expected‖ / ‖expected‖, where both are finite."""
    errors = []
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise Wrong(f"outputs of different shapes: {tuple(one.shape)} and {tuple(other.shape)}")
        finite = one.isfinite() & other.isfinite()
        if not finite.any():
            continue
        a, b = one[finite].double(), other[finite].double()
        size = b.norm().item()
        errors.append(((a - b).norm().item() / size) ** 2 if size else 0.0)
    return (sum(errors) / len(errors)) ** 0.5 if errors else 0.0


def _generates(model: Any, batch: dict[str, Any]) -> int:
    """How many ids the original model generates; 0: it cannot."""
    if not getattr(model, "can_generate", lambda: False)():
        return 0
    try:
        return int(_tokens(model, batch).numel())
    except Exception:
        return 0


def _caches(model: Any, batch: dict[str, Any]) -> bool:
    """Whether a forward pass leaves keys and values in a cache."""
    torch.manual_seed(1)
    output = model(**copy.deepcopy(batch))
    cache = output.get("past_key_values") if isinstance(output, dict) else None
    parts = [getattr(cache, name, None) or cache for name in ("self_attention_cache", "cross_attention_cache")]
    return any(torch.is_tensor(getattr(layer, "keys", None)) for part in parts for layer in getattr(part, "layers", ()))


def _tokens(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(1)
    given = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    found = model.generate(**copy.deepcopy(given), max_new_tokens=4, do_sample=False)
    found = getattr(found, "sequences", found)
    while isinstance(found, (tuple, list)):
        found = found[0]
    if not torch.is_tensor(found):
        raise Wrong(f"generate gave a {type(found).__name__}")
    return found


def _generated(model: Any, batch: dict[str, Any], expected: int) -> str:
    found = int(_tokens(model, batch).numel())
    if not found:
        raise Wrong("generate gave nothing")
    return f"{found}/{expected}"


def _reloaded_equal(
    model_class: Any, folder: str, batch: dict[str, Any], expected: list[torch.Tensor], given: dict[str, Any]
) -> None:
    found = outputs(model_class.from_pretrained(folder, **given).eval(), batch)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(one, other) and not torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)):
            raise Wrong(
                f"output {number} of the reloaded model is not that before saving: {relative_error([one], [other]):.2g}"
            )


def _runs_in(model_class: Any, folder: str, built: Built) -> torch.dtype:
    """The dtype in which transformers itself runs the model that was saved and reloaded in high precision.

    Raises:
        CannotBuild: not all of its weights come back, or it does not run.
    """
    causes = []
    for dtype in dict.fromkeys((built.dtype, torch.float32)):
        model = _plain(model_class, folder, dtype)
        try:
            runs(model, cast(built.batches[0], dtype))
            return dtype
        except Exception as error:
            causes.append(f"{str(dtype).removeprefix('torch.')}: {described(error)}")
    raise CannotBuild(f"saved and reloaded in high precision, it does not run: {'; '.join(causes)}")


def _plain(model_class: Any, folder: str, dtype: torch.dtype) -> Any:
    """The model in high precision, reloaded.

    Raises:
        CannotBuild: it cannot be reloaded, or not all of its weights come back.
    """
    try:
        model, said = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise CannotBuild(f"in high precision, what is saved cannot be loaded: {described(error)}") from None
    wrong = [*said["missing_keys"], *said["unexpected_keys"]]
    if wrong:
        raise CannotBuild(f"in high precision, {len(wrong)} weights are lost between saving and loading: {wrong[0]}")
    return model.eval()


def _cover(row: Row, model: Any, full: Any, batches: list[dict[str, Any]]) -> None:
    """Write down how much is in FP8.

    Raises:
        Nothing: all that could be stays in high precision by default.
        Wrong: none of it is reached.
    """
    reached = called(model, lambda: [outputs(model, each) for each in batches])
    part = coverage(model, full, reached)
    row.share, row.eligible, row.unreached = round(part.share, 4), part.eligible, part.unreached
    row.by_default, row.left = part.by_default, part.left
    if not part.eligible and not part.unreached:
        raise Nothing(f"its layers stay in high precision by default; {_kinds(model)}")
    if not part.eligible:
        raise Wrong("no weight of a kind that becomes FP8 is reached")


def _compare(row: Row, exact: Any, other: Any, layers: Any, full: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Errors beside those of the independent quantization; what the model computes in float32.

    Args:
        row: where they go.
        exact: the model in float32.
        other: the model in high precision, which becomes the independent quantization.
        layers: with layers in FP8 alone.
        full: with attention and caches in FP8, too.
        batch: what they are run with.

    Raises:
        Wrong: too little is in FP8, or the error is too large.
    """
    batch_32 = cast(batch, torch.float32)
    expected = outputs(exact, batch_32)
    eager = alike(outputs(with_eager(exact), batch_32), expected)  # which that of transformers' own is not everywhere
    fake.quantize_in_place(other, codes_of(layers))
    found, independent = (outputs(with_eager(each) if eager else each, batch) for each in (layers, other))
    found_with_attention = outputs(full, batch)
    fixed = of_fixed_shape(found, independent, expected)
    if not fixed:
        raise Wrong("the shapes of all outputs depend on values: there is nothing to compare")
    row.error, row.error_of_fake, row.error_with_attention = (
        relative_error([each[index] for index in fixed], [expected[index] for index in fixed])
        for each in (found, independent, found_with_attention)
    )
    judge(row)
    return expected


def with_eager(model: Any) -> Any:
    """The model, with its eager attention where it has a choice."""
    with suppress(Exception):  # of those that have none
        model.set_attn_implementation("eager")
    return model


def alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether two ways of computing in float32 give the same."""
    return len(found) == len(expected) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-2, equal_nan=True)
        for one, other in zip(found, expected, strict=True)
    )


def of_fixed_shape(
    found: list[torch.Tensor], independent: list[torch.Tensor], expected: list[torch.Tensor]
) -> list[int]:
    """Which outputs have the shape that they have in high precision.

    Where values tell a shape (how long a sound becomes, say), the independent quantization has another one too.

    Raises:
        Wrong: a shape, or the number of outputs, is neither that in high precision nor that of the independent one.
    """
    fixed = []
    for index, (one, other, exact) in enumerate(zip(found, independent, expected, strict=True)):
        if one.shape == exact.shape == other.shape:
            fixed.append(index)
        elif one.shape != other.shape:
            raise Wrong(f"outputs of different shapes: {tuple(one.shape)} and {tuple(exact.shape)}")
    return fixed


def judge(row: Row) -> None:
    """Hold the figures of a row against the limits."""
    if row.share < LEAST_SHARE:
        left = ", ".join(
            f"{reason} ({size})" for reason, size in sorted(row.left.items(), key=lambda each: -each[1])[:3]
        )
        raise Wrong(f"{row.share:.0%} of {row.eligible} eligible bytes in FP8; left: {left}")
    if not row.error <= LARGEST_RATIO * row.error_of_fake + 1e-3:
        raise Wrong(f"error {row.error:.3g}, and {row.error_of_fake:.3g} of the same quantization done independently")
    if not row.error_with_attention <= LARGEST_RATIO * row.error_of_fake + LARGEST_ATTENTION:
        raise Wrong(f"error {row.error_with_attention:.3g} with attention, {row.error_of_fake:.3g} of layers alone")


def _dequantized(row: Row, full: Any, independent: Any, batch: dict[str, Any], expected: list[torch.Tensor]) -> None:
    """What dequantize() gives, beside the model in high precision with the same weights, rounded independently."""
    plain = full.dequantize()
    left = [name for name, each in plain.state_dict().items() if each.dtype == torch.float8_e4m3fn]
    if left:
        raise Wrong(f"{left[0]} is FP8 after dequantize()")
    found, other = outputs(plain, batch), outputs(independent, batch)
    fixed = of_fixed_shape(found, other, expected)
    row.error_of_dequantized, limit = (
        relative_error([each[index] for index in fixed], [expected[index] for index in fixed])
        for each in (found, other)
    )
    if not row.error_of_dequantized <= LARGEST_RATIO * limit + 0.02:
        raise Wrong(f"error {row.error_of_dequantized:.3g} after dequantize(), {limit:.3g} of the same weights")
