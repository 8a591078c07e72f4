"""Decoding during calibration: attention also has to be measured where it runs token by token over a cache.

What goes on is prepared by the model's own methods, those that its `generate` calls: position ids after images,
encoder outputs and token types are a matter of each family.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from ..errors import FP8CalibrationError

_CACHES = ("cache", "past_key_values")  # transformers has renamed it, and warns of the old name
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values", "labels")


class Pass(NamedTuple):
    """One forward pass: its keyword arguments, and the masks `[batch, length]` that say what of them is padding."""

    inputs: dict[str, Any]
    masks: list[torch.Tensor]


Passes = Generator[Pass, Any, None]


def decodes(model: nn.Module) -> bool:
    """Whether `model` is one of transformers' models that generate token by token.

    One that denoises blocks of tokens generates too, without the method that goes on from a prompt. Decoders that begin
    after an encoder need none.
    """
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return False
    config: Any = model.config
    return bool(config.is_encoder_decoder) or hasattr(model, "_update_model_kwargs_for_generation")


def needs_decoder_start(model: Any, inputs: Any) -> bool:
    """Whether the inputs of an encoder-decoder say nothing of what its decoder begins with."""
    if not isinstance(inputs, Mapping) or not decodes(model) or not model.config.is_encoder_decoder:
        return False
    return all(inputs.get(name) is None for name in _DECODER_INPUTS)


def masks_in(inputs: Any) -> list[torch.Tensor]:
    """The masks of padding among a model's inputs."""
    names = ("attention_mask", "decoder_attention_mask") if isinstance(inputs, Mapping) else ()
    masks = [inputs.get(name) for name in names]
    return [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.ndim == 2]


def passes(model: Any, inputs: Mapping[str, Any], steps: int) -> Passes:
    """A forward pass over a cache, and those that go on from it greedily, one token at a time.

    Args:
        model: a model that generates.
        inputs: its keyword arguments.
        steps: how many tokens; fewer where the model returns no cache or no logits.

    Yields:
        the passes; send the output of each back with `send`.

    Raises:
        FP8CalibrationError: an encoder-decoder does not say what its decoder begins with.
    """
    return (_after_encoder if model.config.is_encoder_decoder else _after_prompt)(model, inputs, steps)


def _after_prompt(model: Any, inputs: Mapping[str, Any], steps: int) -> Passes:
    """The passes of a model without an encoder, which goes on from the end of all rows."""
    prompt = _padded_left({**inputs, "use_cache": True})
    kwargs = {name: value for name, value in prompt.items() if name not in ("input_ids", "labels")}
    main = prompt.get("input_ids")
    main = kwargs.get("inputs_embeds") if main is None else main
    if main is not None and prompt.get("position_ids") is None and _takes(model, "position_ids"):
        mask = prompt.get("attention_mask")
        if mask is None or mask.ndim == 2:
            known = kwargs if mask is not None else {**kwargs, "attention_mask": main.new_ones(main.shape[:2]).long()}
            kwargs["position_ids"] = model._prepare_position_ids_for_generation(main, known)
            prompt["position_ids"] = kwargs["position_ids"]
    ids, masks = prompt.get("input_ids"), masks_in(prompt)
    # A model with a `generate` of its own calls its parts by itself.
    if ids is not None and getattr(type(model), "generate", None) is GenerationMixin.generate:
        prompt = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
    output = yield Pass(prompt, masks)
    for _ in range(steps):
        token = _next_token(output, None)
        if token is None:
            return
        ids = token if ids is None else torch.cat([ids, token], dim=1)
        kwargs = model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=False)
        following = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        output = yield Pass(following, masks_in(kwargs))


def _after_encoder(model: Any, inputs: Mapping[str, Any], steps: int) -> Passes:
    """The passes of an encoder-decoder: the encoder runs once, as it is called by the model."""
    # Some pass `use_cache` to their encoder too, which need not take it.
    caches = getattr(model.config.get_text_config(decoder=True), "use_cache", False)
    prompt = _with_decoder_inputs(model, dict(inputs) if caches else {**inputs, "use_cache": True})
    outputs: list[Any] = [prompt.get("encoder_outputs")]
    encoder = model.get_encoder()
    hook = None if encoder is model else encoder.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        output = yield Pass(prompt, masks_in(prompt))
    finally:
        if hook is not None:
            hook.remove()
    encoded = outputs[-1]
    if encoded is None and getattr(output, "encoder_last_hidden_state", None) is not None:
        encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
    ids, mask = prompt.get("decoder_input_ids"), prompt.get("decoder_attention_mask")
    main = {getattr(module, "main_input_name", "input_ids") for module in (model, encoder)}
    dropped = {*_DECODER_INPUTS, "input_ids", *main}
    kwargs = {name: value for name, value in prompt.items() if name not in dropped}
    kwargs |= {"encoder_outputs": encoded, "use_cache": True}
    for _ in range(steps):
        token = _next_token(output, mask)
        if token is None or (ids is not None and ids.ndim != token.ndim):  # it reads several ids at a place
            return
        ids, mask = token if ids is None else torch.cat([ids, token], dim=1), None
        kwargs = model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=True)
        following = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        output = yield Pass(following, masks_in(kwargs))


def _next_token(output: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The likeliest token `[batch, 1]` after the last one, or the last that `mask` has; None: one cannot go on."""
    names = {field for field in _CACHES if field in getattr(output, "__dataclass_fields__", ())}
    logits = getattr(output, "logits", None)
    if all(getattr(output, name) is None for name in names) or not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        return None
    last = logits[:, -1]
    if mask is not None and mask.shape == logits.shape[:2]:
        ends = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        last = logits[torch.arange(len(mask), device=logits.device), ends.to(logits.device)]
    return last.argmax(dim=-1, keepdim=True)


def _padded_left(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose rows all end with a token, as generating expects it: padding goes to where a row begins."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or bool(mask[:, -1].all()):
        return inputs
    order = mask.bool().long().argsort(dim=1, stable=True)  # the padding of each row, then its tokens
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    moved = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape[:2] == mask.shape:
            moved[name] = value[rows, order]
        elif name == "position_ids" and value.shape[-2:] == mask.shape:
            moved[name] = value[..., rows, order]
    return moved


def _with_decoder_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of an encoder-decoder with what its decoder begins with, and where that is padded."""
    labels = inputs.get("labels")
    if needs_decoder_start(model, inputs):
        inputs["decoder_input_ids"] = _decoder_start(model, inputs)
    elif inputs.get("decoder_input_ids") is None and isinstance(labels, torch.Tensor) and labels.ndim == 2:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            inputs["decoder_input_ids"] = shift(labels=labels)
            del inputs["labels"]
        known = labels != -100  # that of padding
        if inputs.get("decoder_attention_mask") is None and _takes(model, "decoder_attention_mask"):
            inputs["decoder_attention_mask"] = known.long()
    return inputs


def _decoder_start(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    if not _takes(model, "decoder_input_ids"):
        taken = [name for name in _DECODER_INPUTS if _takes(model, name)]
        raise FP8CalibrationError(
            f"the decoder of {type(model).__name__} does not begin with a token, and the batch says nothing of what it "
            f"begins with ({sorted(inputs)}): put {' or '.join(taken)} into the batch"
        )
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            start = getattr(config, name, None)
            if start is not None:
                first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
                start = torch.as_tensor(start, dtype=torch.long, device=first.device).reshape(-1)[0]
                # Some decoders read several ids at a place.
                ids, _ = model._prepare_decoder_input_ids_for_generation(len(first), "", {}, start, device=first.device)
                return torch.as_tensor(ids.reshape(-1, ids.shape[-1]).clone())
    raise FP8CalibrationError(
        f"{type(model).__name__} has an encoder and a decoder, and neither the batch nor the model's configuration "
        "says what the decoder begins with: put decoder_input_ids or labels into the batch, or set "
        "model.generation_config.decoder_start_token_id"
    )


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
