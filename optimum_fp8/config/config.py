"""FP8Config: everything the user may ask for, checked when it is made.

Names, values and defaults are Intel Neural Compressor's where it has them and Hugging Face's for the rest. Live objects
(datasets, loaders, tokenizers) are shared when transformers deep-copies a config, and never serialized.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from transformers.utils.quantization_config import FineGrainedFP8Config

from ..errors import FP8ConfigError, nearest
from ..formats import NumberFormat, detect_target, number_format
from ..scales import ScaleMethod
from . import inc, method_dict
from .contradictions import MODEL_RULES, MODULE_RULES, Rule
from .key_texts import docstring_arguments
from .keys import FORMAT_VERSION, KEYS, QUANT_METHOD, ConfigKeys
from .presets import preset
from .values import is_plain

_MOST_SAMPLES = 4096  # of a dataset of which as many are used as it takes


# transformers hands loading attributes (`target`, `dequantize`) of a passed config to a checkpoint's own config only
# for a fixed list of classes: deriving from one of them is how a plugin's configuration takes part.
class FP8Config(ConfigKeys, FineGrainedFP8Config):  # type: ignore[misc]
    """What to quantize to FP8, and how. Every key is a keyword argument and an attribute.

    Raises:
        FP8ConfigError: an unknown key, a bad value, or keys that contradict each other.
        FP8NotAvailableError: something INC has and `optimum_fp8` does not have yet.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {name: key.default for name, key in KEYS.items()}
    LIVE: ClassVar[tuple[str, ...]] = tuple(name for name, key in KEYS.items() if key.live)
    __signature__: ClassVar[inspect.Signature] = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=key.default) for name, key in KEYS.items()]
    )

    def __init__(self, **options: Any):
        if options.pop("quant_method", QUANT_METHOD) != QUANT_METHOD:
            raise FP8ConfigError(f"quant_method must be {QUANT_METHOD!r} for FP8Config")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        options = inc.with_operations(inc.in_our_words(options))
        for name in options:
            if name not in KEYS:
                raise FP8ConfigError(f"unknown key {name!r} in FP8Config: {nearest(name, KEYS)}")
        self._explicit = frozenset(options)
        self._lenient = False
        self._operations: dict[str, tuple[bool, str]] = {}
        for name, key in KEYS.items():
            setattr(self, name, options.get(name, key.default))
        self.post_init()

    @classmethod
    def preset(cls, name: str, **options: Any) -> FP8Config:
        """The config of a scheme that published checkpoints have: "FP8" (calibrated, one scale a tensor), "FP8_DYNAMIC"
        (a scale each output channel and token), "FP8_BLOCK" (128 × 128), "MXFP8" (groups of 32) or "W8A16".

        Args:
            name: of the preset, in any case.
            options: other keys, which win over the preset's.

        Raises:
            FP8ConfigError: an unknown preset, and what the class itself raises.
        """
        return cls(**{**preset(name), **options})

    def post_init(self) -> None:
        """Check what single values cannot tell: keys that contradict each other, and versions from the future."""
        self._derived: dict[str, Any] = {}
        if self.format_version > FORMAT_VERSION:
            raise FP8ConfigError(
                f"format_version={self.format_version} was written by a newer optimum_fp8; this one reads up to "
                f"{FORMAT_VERSION}: upgrade optimum_fp8"
            )
        for place, config in self.variants.items():
            config._check(MODULE_RULES, place)
        self._check(MODEL_RULES)

    def _check(self, rules: Iterable[Rule], place: str = "") -> None:
        for rule in rules:
            if rule.broken(self):
                message = rule.message.format(c=self)
                raise FP8ConfigError(f"{place}: {message}" if place else message)

    # --- modules that differ --------------------------------------------------------------------------------------

    def for_module(self, names: Sequence[str], types: Sequence[str] = ()) -> FP8Config:
        """What the config says of one module: a config without `overrides` whose `scale_method` is one method.

        What wins: an override (the last that says the key), then the entry of `scale_method` for the module's name,
        its layer, its type, and the default entry.

        Args:
            names: all qualified names of the module.
            types: all names of its class that an entry of "layer_types" may use: "Linear", "torch.nn.Linear".

        Raises:
            FP8ConfigError: what overrides and entries say together contradicts itself.
        """
        changes: dict[str, Any] = {}
        for pattern, keys in self.overrides.items():
            if any(re.search(pattern, name) for name in names):
                changes |= keys
        method = changes.get("scale_method", self.scale_method)
        changes["scale_method"] = method_dict.for_module(method, names, types)
        same = repr(changes)
        if same not in self._derived:
            config = self._with(changes)
            config._check(MODULE_RULES, f"module {names[0] if names else ''!r}")
            self._derived[same] = config
        return self._derived[same]

    def decided(self, auto: str, modules: Iterable[tuple[Sequence[str], Sequence[str]]], **changes: Any) -> FP8Config:
        """A config that leaves nothing open: schemes are `auto` where they were "auto", exceptions are said by name.

        Args:
            auto: "static" or "dynamic".
            modules: the names and types of each, as `for_module` takes them; its first name says an exception.
            changes: other keys that change as well.
        """
        rest = self.for_module(())._module_keys(auto)
        exceptions: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for names, types in modules:
            keys = self.for_module(names, types)._module_keys(auto)
            differing = {name: value for name, value in keys.items() if value != rest[name]}
            if differing:
                exceptions.setdefault(repr(differing), (differing, []))[1].extend(names[:1])
        overrides = {f"^(?:{'|'.join(map(re.escape, names))})$": differing for differing, names in exceptions.values()}
        return self.replace(**{**rest, "overrides": overrides, **changes})

    def _module_keys(self, auto: str) -> dict[str, Any]:
        """The keys of a module, with a scheme that is decided."""
        keys = {name: getattr(self, name) for name, key in KEYS.items() if key.of_module}
        scheme = auto if self.scheme == "auto" else self.scheme
        return {**keys, "activation_scheme": scheme, "dynamic_quantization": False}

    @property
    def variants(self) -> dict[str, FP8Config]:
        """What `for_module` gives, for one override or entry at a time, by the place that says so; "" is the rest."""
        if "variants" not in self._derived:
            (_, default), *entries = method_dict.branches(self.scale_method)
            found = {"": default, **{f"scale_method{place}": method for place, method in entries}}
            variants = {place: self._with({"scale_method": method}) for place, method in found.items()}
            for pattern, keys in self.overrides.items():
                here = f"overrides[{pattern!r}]"
                (_, method), *entries = method_dict.branches(keys.get("scale_method", default))
                found = {here: method, **{f"{here}['scale_method']{place}": method for place, method in entries}}
                variants |= {place: self._with({**keys, "scale_method": method}) for place, method in found.items()}
            self._derived["variants"] = variants
        return self._derived["variants"]

    def unused_patterns(self, modules: Iterable[tuple[Sequence[str], Sequence[str]]]) -> list[tuple[str, str]]:
        """The (place, pattern) of overrides and entries of `scale_method` that hold for none of `modules`.

        Args:
            modules: the names and types of each, as `for_module` takes them.
        """
        modules = list(modules)
        names = [name for names, _ in modules for name in names]
        unused = [
            ("overrides", pattern) for pattern in self.overrides if not any(re.search(pattern, name) for name in names)
        ]
        methods = {"scale_method": self.scale_method}
        methods |= {
            f"overrides[{p!r}]['scale_method']": keys.get("scale_method", "") for p, keys in self.overrides.items()
        }
        for place, method in methods.items():
            unused += [(f"{place}[{section!r}]", entry) for section, entry in method_dict.unused(method, modules)]
        return unused

    def _with(self, changes: dict[str, Any]) -> FP8Config:
        """This config with canonical values for some keys, and for one module: nothing is checked or copied."""
        config = type(self).__new__(type(self))
        config.__dict__.update({**self.__dict__, "overrides": {}, **changes, "_derived": {}})
        return config

    # --- what follows from the keys -----------------------------------------------------------------------------

    @property
    def method(self) -> ScaleMethod:
        """The scale method as data; that of the default entry where `scale_method` is a dict."""
        return method_dict.method_of(self.scale_method)

    @property
    def methods(self) -> list[ScaleMethod]:
        """All scale methods that some module may use."""
        return list(dict.fromkeys(config.method for config in self.variants.values()))

    @property
    def scheme(self) -> str:
        """`activation_scheme` as `dynamic_quantization` and the scale method decide it where it is "auto"."""
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
    def leaves_weights(self) -> bool:
        """Whether the model that `from_pretrained` returns has its weights in high precision, to go on with."""
        return self.mode == "MEASURE" or self.fake_quant

    @property
    def may_be_static(self) -> bool:
        """Whether the activations of some module are static, or would be if there were data."""
        return any(config.scheme in ("auto", "static") for config in self.variants.values())

    @property
    def wants_attention(self) -> bool:
        """Whether some attention module has anything to do: FP8 products, or reading an FP8 cache."""
        return any(config.attention or config.kv_cache for config in self.variants.values())

    @property
    def measured(self) -> tuple[str, ...]:
        """The kinds of tensors that are measured, of "input", "output" and "weight"."""
        excluded = {"NONE": (), "INPUT": ("input",), "OUTPUT": ("output",), "PARAMS": ("weight",)}
        if self.measure_exclude == "ALL":
            return ()
        return tuple(kind for kind in ("input", "output", "weight") if kind not in excluded[self.measure_exclude])

    @property
    def most_samples(self) -> int:
        """How many samples of the dataset are used at most."""
        return _MOST_SAMPLES if self.num_calibration_samples == "auto" else int(self.num_calibration_samples)

    def says(self, key: str) -> bool:
        """Whether a key was given, be it the default."""
        return key in self._explicit

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

    @property
    def operations(self) -> dict[str, tuple[bool, str]]:
        """Of a file of INC's: whether its lists select each operation of attention, by INC's name, and why."""
        return self._operations

    # --- serialization ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All keys as JSON-able values; live objects are left out (None)."""
        plain = {name: key.values.plain(getattr(self, name)) for name, key in KEYS.items()}
        return {"quant_method": QUANT_METHOD, **plain}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key as in `to_dict`, or `default`: what code calls that has the config of a checkpoint, which
        is a dict on disk, in either form."""
        return self.to_dict().get(key, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from `to_dict`'s result; `kwargs` that are keys of the config replace its values."""
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in KEYS}
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
        options = inc.read_json(json_file)
        if options.get("quant_method") == QUANT_METHOD:
            return cls.from_dict(options)
        translated = inc.translate(options, KEYS)
        config = cls(**translated)
        config._lenient, config._operations = True, inc.operations(translated)
        return config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers copies onto the config of an FP8 checkpoint when this one is passed to load it.

        Everything that was asked for explicitly goes along, so that the quantizer can honour or refuse it."""
        return {"_requested": {key: getattr(self, key) for key in sorted(self._explicit)}}

    def replace(self, **changes: Any) -> FP8Config:
        """A checked copy with some keys changed; live objects are shared."""
        current = {key: getattr(self, key) for key in KEYS}
        config = type(self)(**{**current, **changes})
        config._explicit = self._explicit | frozenset(changes)
        config._lenient, config._operations = self._lenient, self._operations
        return config

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in KEYS and not name.startswith("_") and name != "quant_method":
            raise FP8ConfigError(f"unknown key {name!r} in FP8Config: {nearest(name, KEYS)}")
        super().__setattr__(name, value)
        if name in KEYS:
            super().__setattr__("_derived", {})

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name, key in KEYS.items()}
        shown = {
            name: type(value) if name in self.LIVE and value is not None and not is_plain(value) else value
            for name, value in values.items()
            if name in self.LIVE or value != KEYS[name].normalize(KEYS[name].default)
        }
        return f"FP8Config({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FP8Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Config:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            shared = name in (*self.LIVE, "_requested")
            clone.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        clone._derived = {}
        return clone


if FP8Config.__doc__ is not None:  # Python leaves docstrings out where it is told to
    FP8Config.__doc__ = f"{inspect.cleandoc(FP8Config.__doc__)}\n\n{docstring_arguments()}"
