"""FP8Config: everything the user may ask for, checked when it is made.

Names, values and defaults are Intel Neural Compressor's where it has them and Hugging Face's for the rest. Live objects
(datasets, loaders, tokenizers) are shared when transformers deep-copies a config, and never serialized.
"""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any, ClassVar

from transformers.utils.quantization_config import FineGrainedFP8Config

from .config_values import NORMALIZERS, check_combinations, normalize, refuse_inc_switches
from .errors import FP8ConfigError, nearest
from .formats import NumberFormat, detect_target, number_format
from .scales import ScaleMethod, scale_method

QUANT_METHOD = "optimum_fp8"
FORMAT_VERSION = 1


# transformers hands loading attributes (`target`, `dequantize`) of a passed config to a checkpoint's own config only
# for a fixed list of classes: deriving from one of them is how a plugin's configuration takes part.
class FP8Config(FineGrainedFP8Config):
    """What to quantize to FP8, and how.

    Args:
        fp8_config: "E4M3" (default) or "E5M2".
        hp_dtype: dtype ("bf16", "fp16", "fp32") that ranges are rounded to and per-tensor scales are computed in. The
            dtype of the model is the `dtype` given to `from_pretrained`.
        observer: how ranges are measured: "maxabs".
        allowlist: {"names": [regex], "types": [class or class name]}; empty means everything that can be quantized.
        blocklist: the same for what must stay in high precision; it wins over `allowlist`.
        mode: "AUTO", "MEASURE", "QUANTIZE" or "LOAD".
        dump_stats_path: folder and file prefix of the measurements.
        scale_method: a name from `optimum_fp8.scales.SCALE_METHODS`.
        measure_exclude: what is not measured: "NONE", "INPUT", "OUTPUT", "PARAMS" or "ALL".
        input_backoff: part of the full scale that the largest activation is mapped to; None: the method's.
        weight_backoff: the same for weights.
        scale_format: "scalar" or "const": how scales reach Gaudi's operators (no effect on results).
        ignore_modules_wo_measures: keep modules that calibration never reached in high precision, with a warning,
            instead of raising.
        dynamic_quantization: INC's switch for `activation_scheme="dynamic"`.
        use_qdq: compute as quantize/dequantize pairs around high-precision operators.
        target: hardware whose numerics apply: "auto", "gaudi2", "gaudi3", "cuda" or "cpu".
        activation_scheme: "static", "dynamic", "weight_only" or "auto".
        dataset: calibration data: list of strings, path of a text or JSON-lines file, `datasets.Dataset`, DataLoader,
            any iterable of batches, or a callable that is given the model.
        tokenizer: tokenizer (or its path) for text; by default the one beside the model.
        processor: processor (or its path) for images; by default the one beside the model.
        num_calibration_samples: samples taken from `dataset`.
        max_seq_length: tokens a text sample is cut to.
        batch_size: samples a calibration batch.
        text_column: column of a `datasets.Dataset` (or key of a JSON line) that holds the text.
        modules_to_not_convert: names kept in high precision, besides the defaults (output head, tied and last module).
        quantize_lm_head: quantize the output head too.
        attention: round what goes into attention's products (q, k, v, softmax) and its output to FP8.
        kv_cache: keep keys and values in FP8 in the caches of `generate` and of plain forward passes.
        attention_granularity: "tensor" (one scale for q, k and v each) or "head" (one for each head).
        attention_dataflow: "fused" (one kernel, scores stay in float32) or "unfused" (product, softmax, product, each
            rounded to the model's dtype).
        softmax_backoff: part of the full scale that a probability of 1 is mapped to; None: as for any activation.
        decode_steps: tokens that calibration generates after each sample where attention or a cache is quantized.
        dequantize: load an FP8 checkpoint as a plain high-precision model.
        format_version: version of the configuration's and checkpoint's format.

    Raises:
        FP8ConfigError: an unknown key, a bad value, or keys that contradict each other.
        FP8NotAvailableError: something INC has and `optimum_fp8` does not have yet.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "fp8_config": "E4M3",
        "hp_dtype": "bf16",
        "observer": "maxabs",
        "allowlist": None,
        "blocklist": None,
        "mode": "AUTO",
        "dump_stats_path": "./hqt_output/measure",
        "scale_method": "maxabs_hw",
        "measure_exclude": "OUTPUT",
        "input_backoff": None,
        "weight_backoff": None,
        "scale_format": "scalar",
        "ignore_modules_wo_measures": False,
        "dynamic_quantization": False,
        "use_qdq": False,
        "target": "auto",
        "activation_scheme": "auto",
        "dataset": None,
        "tokenizer": None,
        "processor": None,
        "num_calibration_samples": 128,
        "max_seq_length": 512,
        "batch_size": 1,
        "text_column": "text",
        "modules_to_not_convert": None,
        "quantize_lm_head": False,
        "attention": False,
        "kv_cache": False,
        "attention_granularity": "tensor",
        "attention_dataflow": "fused",
        "softmax_backoff": None,
        "decode_steps": 8,
        "dequantize": False,
        "format_version": FORMAT_VERSION,
    }
    LIVE: ClassVar[tuple[str, ...]] = ("dataset", "tokenizer", "processor")
    __signature__: ClassVar[inspect.Signature]

    fp8_config: str
    hp_dtype: str
    observer: str
    allowlist: dict[str, list[str]]
    blocklist: dict[str, list[str]]
    mode: str
    dump_stats_path: str
    scale_method: str
    measure_exclude: str
    input_backoff: float | None
    weight_backoff: float | None
    scale_format: str
    ignore_modules_wo_measures: bool
    dynamic_quantization: bool
    use_qdq: bool
    target: str
    dataset: Any
    tokenizer: Any
    processor: Any
    num_calibration_samples: int
    max_seq_length: int
    batch_size: int
    text_column: str
    modules_to_not_convert: list[str] | None  # type: ignore[assignment]
    quantize_lm_head: bool
    attention: bool
    kv_cache: bool
    attention_granularity: str
    attention_dataflow: str
    softmax_backoff: float | None
    decode_steps: int
    format_version: int

    def __init__(self, **options: Any):
        if options.pop("quant_method", QUANT_METHOD) != QUANT_METHOD:
            raise FP8ConfigError(f"quant_method must be {QUANT_METHOD!r} for FP8Config")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        options = refuse_inc_switches(_unfold_inc_keys(options))
        for key in options:
            if key not in self.DEFAULTS:
                raise FP8ConfigError(f"unknown key {key!r} in FP8Config: {nearest(key, self.DEFAULTS)}")
        self._explicit = frozenset(options)
        self._lenient = False
        for key, default in self.DEFAULTS.items():
            setattr(self, key, options.get(key, default))
        self.post_init()

    def post_init(self) -> None:
        """Check what single values cannot tell: keys that contradict each other, and versions from the future."""
        if self.format_version > FORMAT_VERSION:
            raise FP8ConfigError(
                f"format_version={self.format_version} was written by a newer optimum_fp8; this one reads up to "
                f"{FORMAT_VERSION}: upgrade optimum_fp8"
            )
        check_combinations(self, self.method)

    # --- what follows from the keys -----------------------------------------------------------------------------

    @property
    def method(self) -> ScaleMethod:
        """The scale method as data."""
        return scale_method(self.scale_method)

    @property
    def scheme(self) -> str:
        """`activation_scheme` after `dynamic_quantization` and the scale method had their say."""
        if self.activation_scheme != "auto":
            return self.activation_scheme
        if self.dynamic_quantization or self.method.dynamic_only:
            return "dynamic"
        return "auto" if self.method.activation.needs_range else "static"

    @property
    def resolved_target(self) -> str:
        """`target`, with "auto" replaced by what this machine has."""
        return detect_target() if self.target == "auto" else self.target

    @property
    def number_format(self) -> NumberFormat:
        """The FP8 format on the resolved target."""
        return number_format(self.fp8_config, self.resolved_target)

    @property
    def arithmetic(self) -> str:
        """Where operators round (see `ops.reference`)."""
        return "qdq" if self.use_qdq else "gaudi" if self.number_format.is_gaudi else "fused"

    @property
    def wants_attention(self) -> bool:
        """Whether attention modules have anything to do: FP8 products, or reading an FP8 cache."""
        return self.attention or self.kv_cache

    @property
    def measured(self) -> tuple[str, ...]:
        """The kinds of tensors that are measured, of "input", "output" and "weight"."""
        excluded = {"NONE": (), "INPUT": ("input",), "OUTPUT": ("output",), "PARAMS": ("weight",)}
        if self.measure_exclude == "ALL":
            return ()
        return tuple(kind for kind in ("input", "output", "weight") if kind not in excluded[self.measure_exclude])

    @property
    def scale_params(self) -> dict[str, float | None]:
        """The backoffs, by INC's older name for them."""
        return {"input_backoff": self.input_backoff, "weight_backoff": self.weight_backoff}

    @property
    def measure(self) -> bool:
        """Whether `mode` is MEASURE, as INC's scripts ask: then `prepare`."""
        return self.mode == "MEASURE"

    @property
    def quantize(self) -> bool:
        """Whether `mode` is QUANTIZE, as INC's scripts ask: then `convert`."""
        return self.mode == "QUANTIZE"

    @property
    def lenient(self) -> bool:
        """Whether patterns that match nothing only warn: configurations made for INC name modules others lack."""
        return self._lenient

    # --- serialization ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All keys as JSON-able values; live objects are left out (None)."""
        plain = {key: copy.deepcopy(getattr(self, key)) for key in self.DEFAULTS if key not in self.LIVE}
        for key in self.LIVE:
            value = getattr(self, key)
            plain[key] = copy.copy(value) if _is_plain(value) else None
        return {"quant_method": QUANT_METHOD, **plain}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from `to_dict`'s result; `kwargs` that are keys of the config replace its values."""
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.DEFAULTS}
        config = cls(**{**config_dict, **known})
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> FP8Config:
        """Read a configuration file: our own, or one written for Intel Neural Compressor.

        INC's files are taken as they are in the wild: values in any case, "True" for true, `whitelist` for
        `allowlist`, `torch.nn.Linear` as a type, an empty `dump_stats_path`. Keys INC has retired only warn.

        Raises:
            FP8ConfigError: no JSON object, an unknown key or value.
        """
        from .config_inc import read_json, translate

        options = read_json(json_file)
        if options.get("quant_method") == QUANT_METHOD:
            return cls.from_dict(options)
        config = cls(**translate(options, cls.DEFAULTS))
        config._lenient = True
        return config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers copies onto the config of an FP8 checkpoint when this one is passed to load it.

        Everything that was asked for explicitly goes along, so that the quantizer can honour or refuse it."""
        return {"_requested": {key: getattr(self, key) for key in sorted(self._explicit)}}

    def replace(self, **changes: Any) -> FP8Config:
        """A checked copy with some keys changed; live objects are shared."""
        current = {key: getattr(self, key) for key in self.DEFAULTS}
        config = type(self)(**{**current, **changes})
        config._explicit = self._explicit | frozenset(changes)
        config._lenient = self._lenient
        return config

    def __setattr__(self, key: str, value: Any) -> None:
        if key in NORMALIZERS:
            value = normalize(key, value)
        elif not key.startswith("_") and key != "quant_method":
            raise FP8ConfigError(f"unknown key {key!r} in FP8Config: {nearest(key, self.DEFAULTS)}")
        super().__setattr__(key, value)

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.to_dict().items() if value != self._default(key)}
        live = {key: getattr(self, key) for key in self.LIVE}
        shown |= {key: type(value) for key, value in live.items() if value is not None and not _is_plain(value)}
        return f"FP8Config({', '.join(f'{key}={value!r}' for key, value in shown.items())})"

    def _default(self, key: str) -> Any:
        return normalize(key, self.DEFAULTS[key]) if key in self.DEFAULTS else QUANT_METHOD

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FP8Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Config:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for key, value in self.__dict__.items():
            clone.__dict__[key] = value if key in (*self.LIVE, "_requested") else copy.deepcopy(value, memo)
        return clone


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _unfold_inc_keys(options: dict[str, Any]) -> dict[str, Any]:
    """INC's `scale_params={"input_backoff": …}`, `device_for_scales` and older list names said in our keys."""
    options = dict(options)
    for inc_key, key in (("whitelist", "allowlist"), ("blacklist", "blocklist"), ("device_for_scales", "target")):
        if options.get(inc_key) is not None:
            if key in options:
                raise FP8ConfigError(f"both {inc_key!r} and {key!r} are given, which are the same: keep one of them")
            options[key] = options.pop(inc_key)
    params = options.pop("scale_params", None) or {}
    if not isinstance(params, dict):
        raise FP8ConfigError(f"scale_params={params!r} must be a dict with 'input_backoff' and 'weight_backoff'")
    for key, value in params.items():
        if key not in ("input_backoff", "weight_backoff"):
            raise FP8ConfigError(f"unknown key {key!r} in scale_params: valid: input_backoff, weight_backoff")
        if options.get(key) not in (None, value):
            raise FP8ConfigError(f"{key}={options[key]} contradicts scale_params[{key!r}]={value}: give one of them")
        options[key] = value
    return options


FP8Config.__signature__ = inspect.Signature(
    [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value) for key, value in FP8Config.DEFAULTS.items()]
)
