"""The table of FP8Config's keys: each stands here once, and everything else that lists keys is made from this.

The annotation in `ConfigKeys` is the type that checkers see, its `Key` says the rest: the attribute that checks what
is assigned to it, the docstring and signature of FP8Config, the table in `docs/configuration.md`, and the flags of
`optimum-cli fp8 quantize`, which reads this file at every start: nothing here may import torch.
"""

from __future__ import annotations

import copy
import re
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Mapping
from typing import Any

from ..errors import FP8ConfigError, nearest
from .inc import MODES_NOT_THERE
from .method_dict import SCALE_METHOD
from .values import (
    ALLOWLIST,
    BACKOFF,
    BOOLEAN,
    CLASS_NAME,
    COUNT,
    DATASET,
    HP_DTYPE,
    MODULE_LIST,
    NAMES,
    OBSERVER,
    PATH_PREFIX,
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


class Key:
    """One key: an attribute of the config that brings what is assigned to it to one form, or refuses it.

    Attributes:
        default: the value as a user would write it.
        values: the kind of values.
        text: what the key means, in one sentence without its full stop.
        origin: whose key it is: "INC", "HF" or "ours".
        see: where the documentation says more, as a link.
        of_module: whether modules may differ in it, so that it may stand in `overrides`.
        live: whether its object is shared by copies of the config and not serialized.
        has_flag: whether it can be said on a command line.
    """

    name: str

    def __init__(
        self,
        default: Any,
        values: Values,
        text: str,
        origin: str,
        *,
        see: str = "",
        of_module: bool = False,
        live: bool = False,
        has_flag: bool = True,
    ):
        self.default, self.values, self.text, self.origin, self.see = default, values, text, origin, see
        self.of_module, self.live, self.has_flag = of_module, live, has_flag

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return self if config is None else config.__dict__[self.name]

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[self.name] = self.normalize(value)

    def normalize(self, value: Any) -> Any:
        """The canonical form of `value`, or an FP8ConfigError that says what is valid."""
        return self.values.check(self.name, value)

    @property
    def flag(self) -> str:
        """The key as a flag: `--scale-method`."""
        return f"--{self.name.replace('_', '-')}"


def key(*args: Any, **options: Any) -> Any:
    """A `Key` where the annotation beside it says what reading the attribute gives."""
    return Key(*args, **options)


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
    observer: str = key("maxabs", OBSERVER, "what is measured", "INC")
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
        "calibration data; a path is that of a text (.txt, .md) or JSON-lines (.jsonl) file",
        "HF",
        see="the [tutorial](tutorial.md#load-with-a-dataset)",
        live=True,
    )
    tokenizer: Any = key(None, TOKENIZER, "for text; None: the one beside the model", "HF", live=True)
    processor: Any = key(None, PROCESSOR, "for images; None: the one beside the model", "HF", live=True)
    num_calibration_samples: int = key(128, COUNT, "at most this many samples of the dataset are used", "HF")
    max_seq_length: int = key(512, COUNT, "tokens a text sample is cut to; fewer where the model takes fewer", "HF")
    batch_size: int = key(1, COUNT, "samples a calibration batch (batches of a loader stay as they are)", "HF")
    text_column: str = key(
        "text", TEXT, "column of a `datasets.Dataset`, or key of a JSON line, that holds the text", "HF"
    )
    modules_to_not_convert: list[str] | None = key(
        None, NAMES, "kept in high precision besides the defaults (output head, tied and last module)", "HF"
    )
    quantize_lm_head: bool = key(
        False, BOOLEAN, "drop transformers' default exceptions (output head, tied modules, last module)", "ours"
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


# --- what is made from the table ----------------------------------------------------------------------------------


def docstring_arguments() -> str:
    """The `Args` section of FP8Config's docstring."""
    lines = [f"    {key.name}: {key.text} ({key.values.text})." for key in KEYS.values()]
    return "\n".join(["Args:", *lines])


def markdown_table() -> str:
    """The table of keys in `docs/configuration.md`."""
    lines = ["| key | values | default | from | overrides | meaning |", "|---|---|---|---|---|---|"]
    for key in KEYS.values():
        default = f'"{key.default}"' if isinstance(key.default, str) else key.default
        meaning = f"{key.text}, see {key.see}" if key.see else key.text
        cells = [f"`{key.name}`", key.values.text, f"`{default}`", key.origin, "yes" if key.of_module else "", meaning]
        lines.append(re.sub(" +", " ", f"| {' | '.join(cells)} |"))
    return "\n".join(lines)


def add_flags(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Give `parser` a flag for every key that can be said on a command line."""
    for key in KEYS.values():
        if key.has_flag:
            text = f"{key.text} ({key.values.text}; default {key.default})".replace("%", "%%")
            parser.add_argument(key.flag, default=None, help=text, **key.values.flag)


def given_flags(args: Namespace) -> dict[str, Any]:
    """The keys that were said on the command line."""
    values = {key.name: getattr(args, key.name) for key in KEYS.values() if key.has_flag}
    return {name: value for name, value in values.items() if value is not None}
