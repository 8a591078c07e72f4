"""Inputs for a tiny model, found by trying: what its forward pass takes tells what could go in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from .eligible import LAYERS
from .facts import Facts, noise
from .own_inputs import INPUTS

Inputs = dict[str, Any]

TOKENS = 11
_LEFT_OUT = ("past_key_values", "cache", "attentions")  # of what models return
_MISSING = re.compile(r"tokens:?\s*(\d+).*?features:?\s*(?:\()?(\d+)", re.DOTALL)
_OTHER_WIDTH = [
    (re.compile(r"cannot be multiplied \(\d+x(?P<found>\d+) and (?P<wanted>\d+)x"), -1),
    (re.compile(r"to have (?P<wanted>\d+) channels, but got (?P<found>\d+) channels"), 1),
]


class NoInputs(Exception):
    """Nothing that was tried goes through the model; says what the first and the last attempt raised."""


def batches(model: Any, count: int = 2) -> list[Inputs]:
    """Batches that go through a model, of equal shapes and different values.

    Raises:
        NoInputs: nothing that was tried goes through.
    """
    facts = Facts(model.config)
    causes: list[str] = []
    for attempt in _attempts(model, facts):
        found = _fitted(model, facts, attempt, causes)
        if found is not None:
            return [found, *(_varied(found, facts, seed) for seed in range(1, count))]
        if len(causes) > 40:
            break
    raise NoInputs(
        f"first {causes[0]}; last {causes[-1]}" if causes else "its forward pass takes nothing that is known"
    )


@torch.no_grad()
def _fitted(model: Any, facts: Facts, inputs: Inputs, causes: list[str]) -> Inputs | None:
    """The inputs with as many placeholders for images and sounds as the model wants, or None if it takes none."""
    for _ in range(4):
        try:
            runs(model, cast(inputs, model.dtype))
            return inputs
        except Exception as error:
            text = " ".join(str(error).split())
            told = _MISSING.search(text)
            causes.append(f"{'+'.join(inputs)}: {type(error).__name__}: {text[:160]}")
            count = int(told[2]) if told else int("number of audio tokens" in text or "number of image tokens" in text)
            fitted = with_placeholders(inputs, facts, text, count) if "input_ids" in inputs else None
            fitted = fitted or with_width(inputs, text)
            if fitted is None:
                return None
            inputs = fitted
    return None


@torch.no_grad()
def runs(model: Any, inputs: Inputs) -> None:
    """Run a model in high precision, and raise where it cannot, returns nothing, or computes NaN or infinities."""

    def check(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if any(not each.isfinite().all() for each in tensors(args)):
            raise ValueError(f"a {type(module).__name__} is given NaN or infinities, in high precision")

    handles = [each.register_forward_pre_hook(check) for each in model.modules() if isinstance(each, LAYERS)]
    try:
        torch.manual_seed(0)
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not tensors(output):
        raise ValueError("it returns no floating-point tensor")


def with_placeholders(inputs: Inputs, facts: Facts, message: str, features: int) -> Inputs | None:
    """Inputs of one row, with placeholders where an error says that features go."""
    word = next((word for word in ("video", "audio", "image") if word in message.lower()), "image")
    token = facts.token(word)
    width = facts.text("hidden_size", 1)
    count = features if features < 2000 else features // width
    if token is None or not 0 < count < 2000:
        return None
    ids = inputs["input_ids"][:1]
    kept = ids[ids != token]
    ids = torch.cat([kept[:3], torch.full((count,), token), kept[3:]])[None]
    changed = dict(inputs, input_ids=ids)
    if "attention_mask" in inputs:
        changed["attention_mask"] = torch.ones_like(ids)
    kinds = torch.zeros_like(ids)
    for kind, each in enumerate(("image", "video", "audio"), 1):
        if facts.token(each) is not None:
            kinds[ids == facts.token(each)] = kind
    if "mm_token_type_ids" in inputs:
        changed["mm_token_type_ids"] = kinds
    if "token_type_ids" in inputs:
        changed["token_type_ids"] = (kinds > 0).long()
    return changed


def with_width(inputs: Inputs, message: str) -> Inputs | None:
    """Inputs of which one has as many features, or channels, as an error says that a layer takes."""
    for pattern, axis in _OTHER_WIDTH:
        if told := pattern.search(message):
            found, wanted = int(told["found"]), int(told["wanted"])
            for name, value in reversed(inputs.items()):
                wide = torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1
                if wide and value.shape[axis] == found and wanted < 10_000:
                    shape = list(value.shape)
                    shape[axis] = wanted
                    return inputs | {name: noise(*shape)}
    return None


def _attempts(model: Any, facts: Facts) -> Iterator[Inputs]:
    """What might go in, most of it first."""
    own = INPUTS.get(facts.model_type)
    parameters = inspect.signature(model.forward).parameters
    if own is not None:
        yield from (made for made in own(model, facts) if set(made) <= set(parameters) or "kwargs" in parameters)
    names = [name for name in parameters if name not in ("self", "args", "kwargs")]
    pictures = list(_pictures(names, facts)) if getattr(facts.config, "vision_config", True) is not None else []
    sounds = list(_sounds(names, facts)) if getattr(facts.config, "audio_config", True) is not None else []
    texts = [_texts(names, facts, 1 if pictures or sounds else 2)]
    alone = []
    for text, picture, sound in product(texts, [*pictures, {}], [*sounds, {}]):
        if text or picture or sound:
            rows = {
                each.shape[0] for each in (*text.values(), *picture.values(), *sound.values()) if torch.is_tensor(each)
            }
            yield {**text, **picture, **sound, **_known(names, facts, max(rows))}
            alone += [{**picture, **sound}] if text and (picture or sound) else []
    yield from alone
    for text in texts:
        yield from _other_texts(text, facts)
    yield _known(names, facts, 2)
    needed = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    for more in ([], ["encoder_hidden_states"] if "encoder_hidden_states" in names else []):
        yield {name: next(facts.tensors_for(name)) for name in (*needed, *more)}
    main = getattr(model, "main_input_name", "input_ids")
    if main in names:
        yield from ({main: made} for made in facts.tensors_for(main))


def _known(names: list[str], facts: Facts, rows: int) -> Inputs:
    return {name: value for name, value in facts.known(rows).items() if name in names}


def _texts(names: list[str], facts: Facts, rows: int) -> Inputs:
    made: Inputs = {}
    ids = facts.ids(rows, TOKENS)
    if "input_ids" in names:
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made |= {"bbox": torch.arange(4).expand(rows, TOKENS, 4), "mm_token_type_ids": torch.zeros_like(ids)}
        made |= {"token_type_ids": torch.zeros_like(ids)}
    streams = getattr(getattr(facts.config, "decoder", None), "num_codebooks", 1)
    made["decoder_input_ids"] = facts.ids(rows * streams, 7)
    return {name: value for name, value in made.items() if name in names}


def _other_texts(text: Inputs, facts: Facts) -> Iterator[Inputs]:
    """Texts as some heads want them: ended, for an encoder alone, as several choices, without a cache."""
    if "input_ids" not in text:
        return
    encoded = {name: value for name, value in text.items() if not name.startswith("decoder")}
    end = facts.text("eos_token_id", None)
    if isinstance(end, int):
        ended = encoded["input_ids"].clone()
        ended[:, -1] = end
        yield encoded | {"input_ids": ended}
    if codebooks := facts.find("num_codebooks", None):
        yield {"input_ids": facts.ids(2, TOKENS, codebooks + 1)}
        yield {"input_ids": facts.ids(2 * codebooks, TOKENS)}
    yield {name: torch.stack([value, value.flip(0)], dim=1) for name, value in encoded.items()}
    yield text | {"use_cache": False}


def _pictures(names: list[str], facts: Facts) -> Iterator[Inputs]:
    channels, (height, width) = facts.channels, facts.picture
    patch, merged, temporal = facts.patch, facts.temporal_patch, facts.vision("spatial_merge_size", 2)
    side = 2 * temporal
    if "image_grid_thw" in names and "pixel_values" in names:
        grid = torch.tensor([[1, side, side]])
        yield {"pixel_values": noise(side * side, channels * merged * patch**2), "image_grid_thw": grid}
        yield {"pixel_values": noise(side * side, channels, patch, patch), "image_grid_thw": grid}
    for name in ("image_position_ids", "pixel_position_ids"):
        if name in names and "pixel_values" in names:
            places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
            yield {"pixel_values": noise(1, 36, channels * patch**2), name: places}
    if "grid_thw" in names and names[0] in ("hidden_states", "pixel_values"):
        yield {names[0]: noise(side * side, channels * merged * patch**2), "grid_thw": torch.tensor([[1, side, side]])}
        yield {names[0]: noise(side * side, channels, patch, patch), "grid_thw": torch.tensor([[1, side, side]])}
    if "pixel_values" in names:
        if "spatial_shapes" in names or "pixel_attention_mask" in names:
            count = (height // patch) * (width // patch)
            shapes = torch.tensor([[height // patch, width // patch]])
            flat = {"pixel_values": noise(1, count, channels * patch**2), "spatial_shapes": shapes}
            flat |= {"pixel_attention_mask": torch.ones(1, count, dtype=torch.long)}
            yield {name: value for name, value in flat.items() if name in names}
        sizes = {"image_sizes": torch.tensor([[height, width]])} if "image_sizes" in names else {}
        if sizes:
            yield {"pixel_values": noise(1, 3, channels, height, width), **sizes}
            yield {"pixel_values": noise(1, channels, height, width), **sizes}
        for rows in (2, 1):
            yield {"pixel_values": noise(rows, channels, height, width)}
            yield {"pixel_values": noise(rows, facts.vision("num_frames", 2), channels, height, width)}
        yield {"pixel_values": noise(1, 1, channels, height, width)}
        yield {"pixel_values": noise(1, 64, channels * patch**2)}
    elif "pixel_values_videos" in names:
        yield {"pixel_values_videos": noise(1, facts.vision("frames_per_clip", 4), channels, height, width)}
    if "flattened_patches" in names:
        yield {
            "flattened_patches": torch.cat(
                [torch.ones(1, 16, 2), noise(1, 16, facts.vision("patch_embed_hidden_size", 768))], -1
            )
        }


def _sounds(names: list[str], facts: Facts) -> Iterator[Inputs]:
    for name in ("input_features", "input_values", "audio_values", "input_audio_embeds"):
        if name in names:
            for made in facts.tensors_for(name):
                masks = {"feature_attention_mask": made.shape[-1], "input_features_mask": made.shape[1]}
                yield {name: made} | {
                    mask: torch.ones(made.shape[0], length, dtype=torch.bool)
                    for mask, length in masks.items()
                    if mask in names
                }
                yield {name: made}


def _varied(inputs: Inputs, facts: Facts, seed: int) -> Inputs:
    """Other values: floats are turned around, ids that mean nothing special are moved."""
    return {name: _other(name, value, facts, seed) for name, value in inputs.items()}


def _other(name: str, value: Any, facts: Facts, seed: int) -> Any:
    if not torch.is_tensor(value) or "mask" in name or "boxes" in name:
        return value
    if value.is_floating_point():
        return value.roll(seed, dims=-1) if name not in ("flattened_patches",) else value
    if name in ("input_ids", "decoder_input_ids"):
        plain = facts.is_plain(value)
        return torch.where(plain, facts.ids(*value.shape, seed=seed), value)
    return value


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating-point inputs in a dtype."""
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors that a model returned, but caches, and probabilities, which not all attention has."""
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        found = [value for name, value in output.items() if not any(word in name for word in _LEFT_OUT)]
    elif isinstance(output, (list, tuple)):
        found = list(output)
    else:
        return []
    return [tensor for each in found for tensor in tensors(each)]
