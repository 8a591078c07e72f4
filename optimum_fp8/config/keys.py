"""The table of FP8Config's keys: each stands here once, and everything else that lists keys is made from this.

The annotation in `ConfigKeys` is the type that checkers see, its `Key` says the rest: the attribute that checks what
is assigned to it, the docstring and signature of FP8Config, the table in `docs/configuration.md`, and the flags of
`optimum-cli fp8 quantize` (`flags.py`), which reads this file at every start: nothing here may import torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..errors import FP8ConfigError, nearest
from .inc import MODES_NOT_THERE
from .key import Key, key
from .method_dict import SCALE_METHOD
from .values import (
    ALLOWLIST,
    BACKOFF,
    BOOLEAN,
    CLASS_NAME,
    COUNT,
    COUNT_OR_AUTO,
    DATASET,
    HP_DTYPE,
    MODULE_LIST,
    NAMES,
    OBSERVER,
    OPTIONAL_COUNT,
    OPTIONAL_TEXT,
    PATH_PREFIX,
    PERCENT,
    PROCESSOR,
    TEXT,
    TOKENIZER,
    WHOLE,
    Values,
    check_regex,
    choice,
    json_argument,
)

QUANT_METHOD = "optimum_fp8"
FORMAT_VERSION = 2


def _overrides(where: str, value: Any) -> dict[str, dict[str, Any]]:
    """{pattern: {key: value}} in the order given, from a dict or from the pairs that it is serialized as."""
    of_module = [name for name, key in KEYS.items() if key.of_module]
    pairs = [
        (pattern, keys) for pattern, keys in (value.items() if isinstance(value, Mapping) else _pairs(where, value))
    ]
    checked: dict[str, dict[str, Any]] = {}
    for pattern, keys in pairs:
        check_regex(where, pattern)
        here = f"{where}[{pattern!r}]"
        if not isinstance(keys, Mapping):
            raise FP8ConfigError(f"{here}={keys!r} is not valid: expected a dict of keys and values")
        for name in keys:
            if name in KEYS and name not in of_module:
                raise FP8ConfigError(
                    f"{name!r} in {here} holds for the whole model: of modules are {', '.join(of_module)}"
                )
            if name not in KEYS:
                raise FP8ConfigError(f"unknown key {name!r} in {here}: {nearest(str(name), of_module)}")
        checked[pattern] = {name: KEYS[name].values.check(f"{here}[{name!r}]", keys[name]) for name in keys}
    return checked


def _pairs(where: str, value: Any) -> list[tuple[Any, Any]]:
    value = [] if value is None else value
    if isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return [(pattern, keys) for pattern, keys in value]
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected {{pattern: {{key: value}}}}")


# transformers sorts the keys of what it writes as JSON, and later overrides win over earlier ones: hence pairs.
OVERRIDES = Values(
    _overrides,
    "{regex: {key: value}}, None",
    {"type": json_argument, "metavar": "JSON"},
    lambda overrides: [[pattern, copy.deepcopy(keys)] for pattern, keys in overrides.items()],
)


class ConfigKeys:
    """The keys, in the order in which they are shown."""

    fp8_config: str = key(
        "E4M3", choice("E4M3", "E5M2"), "the FP8 format of weights and activations", "INC", of_module=True
    )
    hp_dtype: str = key(
        "bf16",
        HP_DTYPE,
        "dtype that ranges are rounded to and per-tensor scales are computed in; it does not change the model's dtype",
        "INC",
        of_module=True,
    )
    observer: str = key(
        "maxabs",
        OBSERVER,
        "what is measured of activations, and how their range follows from it; that of moving_average depends on the "
        "order of the data",
        "INC",
        see="[which observer](scale-methods.md#which-observer)",
    )
    percentile: float = key(
        99.99,
        PERCENT,
        'share of values, in percent, that the range of `observer="percentile"` holds; the rest may saturate',
        "ours",
    )
    allowlist: dict[str, list[str]] = key(
        None, ALLOWLIST, "only these modules; empty or None: every module that can be quantized", "INC"
    )
    blocklist: dict[str, list[str]] = key(
        None, MODULE_LIST, "these stay in high precision; it wins over `allowlist`", "INC"
    )
    mode: str = key(
        "AUTO",
        choice("AUTO", "MEASURE", "QUANTIZE", "LOAD", not_there=MODES_NOT_THERE),
        "what `from_pretrained` does",
        "INC",
        see="[below](#how-activations-are-scaled)",
    )
    dump_stats_path: str = key(
        "./hqt_output/measure",
        PATH_PREFIX,
        "where measurements are written and looked for: `<prefix>_measurements.safetensors`",
        "INC",
        of_data=True,
    )
    scale_method: str | dict[str, Any] = key(
        "maxabs_hw",
        SCALE_METHOD,
        "how scales follow from ranges",
        "INC",
        see="[scale methods](scale-methods.md) and [below](#other-rules-for-some-modules)",
        of_module=True,
    )
    measure_exclude: str = key(
        "OUTPUT",
        choice("NONE", "INPUT", "OUTPUT", "PARAMS", "ALL"),
        "what is not measured; static activations need inputs",
        "INC",
    )
    input_backoff: float | None = key(
        None,
        BACKOFF,
        "part of the full scale that the largest activation is mapped to; None: the method's",
        "INC",
        of_module=True,
    )
    weight_backoff: float | None = key(None, BACKOFF, "the same for weights", "INC", of_module=True)
    scale_format: str = key(
        "scalar",
        choice("scalar", "const"),
        "how scales are handed to Gaudi's operators; changes no result",
        "INC",
        of_module=True,
    )
    ignore_modules_wo_measures: bool = key(
        False,
        BOOLEAN,
        "keep modules that calibration never reached in high precision, with a warning, instead of raising",
        "INC",
    )
    dynamic_quantization: bool = key(False, BOOLEAN, 'the same as `activation_scheme="dynamic"`', "INC", of_module=True)
    use_qdq: bool = key(
        False, BOOLEAN, "compute as quantize/dequantize pairs around high-precision operators", "INC", of_module=True
    )
    row_parallel_linear_allreduce_quantization: bool = key(
        False,
        BOOLEAN,
        "add up in FP8 what processes compute of one new token in layers split by rows (`RowParallelLinear`, "
        "`LinearAllreduce`), which halves what they send; static activations only",
        "INC",
        of_module=True,
    )
    target: str = key(
        "auto",
        choice("auto", "gaudi2", "gaudi3", "cuda", "cpu"),
        "hardware whose numerics apply; auto: the accelerator of this machine, else the CPU",
        "ours",
    )
    activation_scheme: str = key(
        "auto",
        choice("auto", "static", "dynamic", "weight_only"),
        "how activations are scaled",
        "HF",
        see="[below](#how-activations-are-scaled)",
        of_module=True,
    )
    dataset: Any = key(
        None,
        DATASET,
        "calibration data: text, conversations, images, audio or batches; a path, a dataset's name on the Hub, or an "
        "object",
        "HF",
        see="[calibrate with your data](calibration-data.md)",
        live=True,
        of_data=True,
    )
    tokenizer: Any = key(None, TOKENIZER, "for text; None: the one beside the model", "HF", live=True, of_data=True)
    processor: Any = key(
        None, PROCESSOR, "for images and audio; None: the one beside the model", "HF", live=True, of_data=True
    )
    dataset_config_name: str | None = key(
        None,
        OPTIONAL_TEXT,
        "configuration of a dataset that is a hub name or a folder of `datasets`",
        "HF",
        of_data=True,
    )
    dataset_split: str | None = key(
        None, OPTIONAL_TEXT, 'split of the dataset, as `datasets` writes it: "train", "test[:10%]"', "HF", of_data=True
    )
    dataset_revision: str | None = key(
        None, OPTIONAL_TEXT, "revision of a dataset that is a hub name", "HF", of_data=True
    )
    num_calibration_samples: int | str = key(
        128,
        COUNT_OR_AUTO,
        'at most this many samples of the dataset are used; "auto": as many as it takes until ranges no longer move',
        "HF",
        see="[is it enough?](enough-data.md)",
        of_data=True,
    )
    shuffle_calibration_samples: bool = key(
        False, BOOLEAN, "take samples in a random order, the same for each `calibration_seed`", "HF", of_data=True
    )
    calibration_seed: int = key(0, WHOLE, "seed of the random order", "ours", of_data=True)
    max_seq_length: int = key(
        512, COUNT, "tokens a text sample is cut to; fewer where the model takes fewer", "HF", of_data=True
    )
    batch_size: int = key(
        1, COUNT, "samples a calibration batch (batches of a loader stay as they are)", "HF", of_data=True
    )
    text_column: str = key(
        "text", TEXT, "column of the dataset that holds the text or the conversation", "HF", of_data=True
    )
    concatenate_data: bool = key(
        False,
        BOOLEAN,
        "pack texts into samples of `max_seq_length` tokens instead of cutting and padding them",
        "HF",
        of_data=True,
    )
    calibration: str = key(
        "whole",
        choice("whole", "sequential"),
        "run samples through the whole model, or all of them through one block after the other, with the weights of "
        "one block in memory",
        "ours",
        see="[a model larger than memory](larger-than-memory.md)",
    )
    calibration_inputs: str = key(
        "memory",
        choice("memory", "disk"),
        'where `calibration="sequential"` keeps the samples and what blocks return for them',
        "ours",
        of_data=True,
    )
    calibration_log: str | None = key(
        None,
        OPTIONAL_TEXT,
        "file that the progress of calibration is appended to, one JSON object a line",
        "ours",
        of_data=True,
    )
    min_tokens_per_module: int = key(
        0,
        WHOLE,
        "warn of modules, and experts, that fewer tokens went through; 0: only of experts that got none",
        "HF",
        see="[is it enough?](enough-data.md#samples-and-tokens)",
        of_data=True,
    )
    calibrate_all_experts: bool = key(
        False,
        BOOLEAN,
        "measure each of several experts whose weights are stacked with all tokens, not just with those sent to it",
        "HF",
        see="[mixtures of experts](moe.md#calibration)",
    )
    modules_to_not_convert: list[str] | None = key(
        None, NAMES, "kept in high precision besides the defaults (output head, tied and last module)", "HF"
    )
    quantize_lm_head: bool = key(
        False,
        BOOLEAN,
        "drop the default exceptions: output head, tied modules, last module; both ends of a diffusion model",
        "ours",
    )
    quantize_routers: bool = key(
        False, BOOLEAN, "quantize the linear layers that choose experts, or weigh shared ones, like any other", "ours"
    )
    quantize_embeddings: bool = key(
        False, BOOLEAN, "store embeddings in FP8", "ours", see="[layers](layers.md#embeddings)", of_module=True
    )
    fold_batch_norm: bool = key(
        False,
        BOOLEAN,
        "fold batch norms into the convolutions before them",
        "ours",
        see="[layers](layers.md#batch-norms)",
    )
    attention: bool = key(
        False,
        BOOLEAN,
        "round what goes into attention's products (q, k, v, the softmax) and its output to FP8",
        "ours",
        of_module=True,
    )
    kv_cache: bool = key(
        False,
        BOOLEAN,
        "keep keys and values in FP8 in the caches of `generate` and of plain forward passes",
        "ours",
        of_module=True,
    )
    kv_cache_skip: str = key(
        "none",
        choice("none", "sliding"),
        "caches that `kv_cache` leaves in high precision: those of attention with a sliding window, which are small",
        "ours",
        of_module=True,
    )
    attention_granularity: str = key(
        "tensor",
        choice("tensor", "head"),
        "one calibrated scale for q, k and v each, or one for each head",
        "ours",
        of_module=True,
    )
    attention_dataflow: str = key(
        "fused",
        choice("fused", "unfused"),
        "where attention rounds: as one kernel, or as product, softmax and product",
        "ours",
        of_module=True,
    )
    softmax_backoff: float | None = key(
        None,
        BACKOFF,
        "part of the full scale that a probability of 1 is mapped to; None: as for any activation",
        "ours",
        see="[the softmax](attention.md#the-softmax)",
        of_module=True,
    )
    decode_steps: int = key(
        8, WHOLE, "tokens that calibration generates after each sample, where attention or a cache is quantized", "ours"
    )
    fake_quant: bool = key(
        False,
        BOOLEAN,
        "quantization-aware training: compute in high precision with weights and inputs that are rounded to FP8",
        "INC",
        see="[quantization-aware training](qat.md)",
    )
    amax_history_len: int = key(
        1,
        COUNT,
        "of `fake_quant`: over how many steps inputs have their range; 1: each input by its own",
        "ours",
        see="[quantization-aware training](qat.md#scales)",
    )
    freeze_scales_at: int | None = key(
        None,
        OPTIONAL_COUNT,
        "of `fake_quant`: after how many steps scales stay as they are; None: never",
        "ours",
        see="[quantization-aware training](qat.md#scales)",
    )
    overrides: dict[str, dict[str, Any]] = key(
        None,
        OVERRIDES,
        "other values of keys for modules whose names match",
        "ours",
        see="[below](#other-rules-for-some-modules)",
    )
    dequantize: bool = key(
        False, BOOLEAN, "load an FP8 checkpoint as a plain high-precision model", "HF", has_flag=False
    )
    model_class: str | None = key(
        None, CLASS_NAME, "class of the model that a checkpoint was made of", "ours", has_flag=False
    )
    format_version: int = key(
        FORMAT_VERSION, COUNT, "version of the configuration and checkpoint format", "ours", has_flag=False
    )


KEYS: dict[str, Key] = {name: value for name, value in vars(ConfigKeys).items() if isinstance(value, Key)}
