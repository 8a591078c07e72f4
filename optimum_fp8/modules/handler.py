"""ModuleHandler: everything the steps of quantization ask about one kind of module, and the registry of all kinds.

A new kind of module is one file that defines its FP8 counterpart and registers a handler for it; selecting, observing,
converting, saving, loading, dequantizing and reporting ask the handlers, and name no kind. A handler is given modules,
schemes and ranges, never the configuration or the model's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError
from ..formats import NumberFormat, number_format
from ..measure import Observers, Purpose, Ranges
from ..scales import ScaleRule, Scheme


class Reason(Enum):
    """Why a module is in FP8, or is not; the value is its text, which a `Why` can make more precise."""

    SELECTED = "selected"
    NOT_ASKED_FOR = "not asked for by the configuration"
    EXCLUDED = "excluded by the configuration"
    UNFIT = "it cannot be converted"
    CODES = "its weight is quantized already"
    KEPT = "kept by default: head, tied or float32"
    ROUTES = "kept by default: it chooses experts"
    NOT_ALLOWED = "not in allowlist"
    IMPLEMENTATION_CHOSEN = "another attention implementation was chosen"
    NEVER_REACHED = "never reached by calibration"
    NOT_SEEN = "none of its products was seen"
    NOT_IN_CHECKPOINT = "not FP8 in the checkpoint"
    NO_CANDIDATE = "no kind of module that is quantized"


@dataclass(frozen=True)
class Why:
    """A reason, and how it reads for the module at hand."""

    reason: Reason
    text: str = ""

    def __str__(self) -> str:
        return self.text or self.reason.value


def spoken_type(path: str) -> str:
    """How messages call a class, given its full name: by its own, and its package's where torch has nearly the same.

    transformers' Conv1D is a linear layer, and torch's Conv1d a convolution.
    """
    package, name = path.split(".")[0], path.rpartition(".")[2]
    if package == "torch" or name.lower() not in _LIKE_TORCH:
        return name
    return f"{package}' {name}" if package.endswith("s") else f"{package}'s {name}"


_LIKE_TORCH = frozenset(name.lower() for name, value in vars(nn).items() if isinstance(value, type))


@dataclass(frozen=True)
class Family:
    """What several kinds of modules have in common.

    Attributes:
        name: "layers" or "attention": the part of the report that their rows stand in.
        noun: what messages call them.
        reaching: what to do about modules that calibration never reached, for messages.
        keys: the keys of the configuration that ask for them, for messages; empty if everything does.
        replaced: whether other modules take their place; the allowlist and transformers' default exceptions are about
            those.
        check: called with the modules to be converted and their ranges; raises where they do not do as a whole.
    """

    name: str
    noun: str
    reaching: str
    keys: str = ""
    replaced: bool = True
    check: Callable[[Iterable[Target]], None] = lambda targets: None


@dataclass(frozen=True)
class Target:
    """One selected module: what the steps work on; `model` is what it is in, where that is known."""

    name: str
    module: Any
    handler: ModuleHandler
    scheme: Scheme
    ranges: Ranges
    model: nn.Module | None = None

    def on(self, hardware: str) -> Target:
        """The same module with the number format, and so the scales, of another target."""
        fmt = number_format(self.scheme.fmt.name, hardware)
        return replace(self, scheme=replace(self.scheme, fmt=fmt))

    def static_scale(self, kind: str, rule: ScaleRule | None = None) -> torch.Tensor:
        """The scale that follows from the range of one of its tensors, by `rule` (by default the input's): `(1,)`."""
        scale_of = partial(self.scheme.static_scale, rule=rule)
        return scale_of(self.ranges.of(kind, Purpose(self.scheme.fmt, scale_of)))


@dataclass
class Conversion:
    """One module's conversion, made but not done yet.

    Attributes:
        replacement: the module that takes the place of the original; None where it stays.
        apply: changes what stays in place, once all conversions have been made.
        undo: takes back what `apply` did.
    """

    replacement: nn.Module | None = None
    apply: Callable[[], None] = lambda: None
    undo: Callable[[], None] = lambda: None


@dataclass
class Change:
    """An attribute of an object around the modules that was set, and what it was."""

    owner: Any
    attribute: str
    before: Any

    def undo(self) -> None:
        setattr(self.owner, self.attribute, self.before)


@dataclass(frozen=True)
class Row:
    """What a handler tells the report about a converted module.

    Attributes:
        activations: "static", "dynamic", "weight_only" or "cache only".
        record: the calls of its operators.
        scheme: how it is scaled and computed, in words.
        scales: its scales by name.
        cached: layers of caches that became FP8 for it.
        cache_refused: why others stayed in high precision, with counts.
        high_precision: the dtype that its FP8 codes had, if it holds any.
        remark: what of it is not as its configuration says, and why.
    """

    activations: str
    record: ops.CallRecord
    scheme: str
    scales: dict[str, torch.Tensor]
    cached: int = 0
    cache_refused: dict[str, int] = field(default_factory=dict)
    high_precision: torch.dtype | None = None
    remark: str = ""


@dataclass(frozen=True)
class Surroundings:
    """The model around a module, and what its user chose for it.

    Attributes:
        model: the model.
        implementations: attention implementations the user chose while loading, by `id` of the configuration.
        implied: whether what is asked for is all that a model has, as by an empty list of INC's, not all of it by name.
    """

    model: nn.Module
    implementations: Mapping[int, str] = field(default_factory=dict)
    implied: bool = False


class ModuleHandler:
    """One kind of module. What a kind does not need is inherited: it refuses, observes and restores nothing.

    Attributes:
        kind: its name.
        types: names of the classes it is for.
        operations: of attention, by INC's names, that a module of this kind does by itself; lists may switch each.
        known_types: these, and names that lists of a configuration may hold although a model has no such class.
        family: what it has in common with other kinds.
        unlisted_before: whether older versions left modules of this kind in high precision without listing them.
    """

    kind: str = ""
    unlisted_before: bool = False
    types: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    family: Family

    @property
    def known_types(self) -> tuple[str, ...]:
        return self.types

    @property
    def spoken_types(self) -> tuple[str, ...]:
        """The classes as messages call them."""
        return self.types

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHandler:
        return self  # copies of a model share their handlers

    def matches(self, module: nn.Module) -> bool:
        """Whether a module in high precision is of this kind."""
        raise NotImplementedError

    def parts(self, module: nn.Module) -> Iterable[nn.Module]:
        """Modules inside one of this kind, converted or not, that hold tensors for it and are of no kind themselves."""
        return ()

    def find(self, model: nn.Module) -> dict[str, Any]:
        """All modules of this kind by qualified name (one in two places has its first name)."""
        return {name: module for name, module in model.named_modules() if self.matches(module)}

    def concerned(self, scheme: Scheme) -> bool:
        """Whether a scheme asks for anything of this kind at all."""
        return True

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        """Why a module of this kind stays in high precision, or None."""
        return None

    def limit(self, module: Any, scheme: Scheme, around: Surroundings) -> tuple[dict[str, Any], str]:
        """What of a scheme a module of this kind cannot have: fields with the values they get, and why."""
        return {}, ""

    def observe(self, target: Target, observers: Observers) -> None:
        """Have `observers` see what conversion needs ranges of."""

    def around(self, model: nn.Module, modules: Mapping[str, nn.Module], others: Iterable[nn.Module]) -> list[Change]:
        """Change what the model around modules of this kind needs so that they are observed or converted.

        Args:
            model: the model.
            modules: the selected modules of this kind by name.
            others: modules whose user chose another way of computing them.

        Returns:
            what was changed.
        """
        return []

    def missing(self, target: Target) -> Why | None:
        """Why a module cannot be converted with the ranges there are, or None."""
        return None

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        """Make the conversion of a module; nothing is changed yet.

        Args:
            target: the module, with its scheme and ranges.
            model: the model around it.
            quantize: codes and scale of a weight `[out, in, …]` by the scheme, as parameters that tied weights share.
        """
        raise NotImplementedError

    def fake_quant(self, target: Target, delay: Any) -> Any:
        """What rounds the operands of a module in training, a `FakeQuant`; scales follow by `delay`, a `Delay`."""
        raise FP8NotAvailableError(f"{target.name}: fake_quant=True cannot train {self.kind!r} modules: blocklist it")

    def converted(self, model: nn.Module) -> dict[str, Any]:
        """All converted modules of this kind by qualified name."""
        raise NotImplementedError

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        """Take the conversion back: the module to put in its place, with weights in `dtype`, or None if it stays."""
        raise NotImplementedError

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        """Make room for the tensors that a checkpoint is about to bring.

        Args:
            target: the module, still in high precision and without data.
            saved: shapes of the module's scales in an FP8 checkpoint by name; None for one in high precision.

        Returns:
            the module to put in its place, or None if it stays.
        """
        raise NotImplementedError

    def loaded(self, target: Target) -> None:
        """Start a module of an FP8 checkpoint, whose tensors are there."""

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        """The tensors of a converted module that a checkpoint cannot lack, by their name below the module's."""
        raise NotImplementedError

    def held(self, module: Any) -> dict[str, torch.Tensor]:
        """The parameters and buffers of a converted module, by name, where those of a checkpoint are parts of them."""
        return self.state(module)

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        """The scales of what is rounded at run time, by name: nothing but ranges and the scheme decides."""
        return {}

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        """Those that a converted module has.

        Raises:
            FP8NotAvailableError: modules of this kind cannot be brought to another target.
        """
        raise FP8NotAvailableError(
            f"a checkpoint with {self.kind!r} modules cannot be loaded for another target: load it for its own, or "
            "quantize the original model for the other"
        )

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        """Give a converted module others in the place of those that it has."""
        raise NotImplementedError

    def fit_weight(self, target: Target, made_for: NumberFormat, fit: FitWeight) -> None:
        """Bring the weight of a converted module of a checkpoint, made for one number format, within the scheme's.

        Args:
            target: the module, with the scheme that it is loaded with.
            made_for: the number format of its codes.
            fit: codes and scale of a weight within a scheme's number format, as parameters that tied weights share.
        """

    def rescheme(self, target: Target, fit: FitWeight) -> None:
        """Give a converted module its target's scheme: weights as `fit` makes them, other scales from the ranges.

        Raises:
            FP8NotAvailableError: modules of this kind cannot change theirs.
        """
        raise FP8NotAvailableError(f"{target.name}: {self.kind!r} modules keep their scales: quantize the original")

    def pack(self, module: Any) -> None:
        """Bring the tensors of a converted module into the form that the backend in use wants."""

    def row(self, module: Any) -> Row | None:
        """What the report says of a module; None where it is not converted."""
        raise NotImplementedError

    def bypassed(self, module: Any) -> str:
        """Why a module does not do at present what it was prepared or converted for; empty: it does."""
        return ""


Quantize = Callable[[nn.Parameter, torch.Tensor, Scheme], tuple[nn.Parameter, nn.Parameter]]
FitWeight = Callable[[nn.Parameter, nn.Parameter, Scheme], tuple[nn.Parameter, nn.Parameter]]

_handlers: list[ModuleHandler] = []


def register_handler(handler: ModuleHandler) -> ModuleHandler:
    """Add a kind of module. It is asked before those registered earlier; one of the same name is replaced."""
    _handlers[:] = [known for known in _handlers if known.kind != handler.kind]
    _handlers.insert(0, handler)
    return handler


def handlers() -> list[ModuleHandler]:
    """All handlers, the one registered last first."""
    return list(_handlers)


def find_all(model: nn.Module) -> dict[str, tuple[Any, ModuleHandler]]:
    """Every module of a known kind with its handler, by qualified name, in the order they stand in the model."""
    found: dict[str, tuple[Any, ModuleHandler]] = {}
    for handler in _handlers:
        for name, module in handler.find(model).items():
            found.setdefault(name, (module, handler))
    found = _without_parts(found)
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def pack_all(model: nn.Module) -> None:
    """Bring the tensors of all converted modules into the form that the backend in use wants, and start it up with the
    model, if all of them lie on its device."""
    devices: set[torch.device] = set()
    for module, handler in converted_modules(model).values():
        handler.pack(module)
        devices |= {tensor.device for tensor in handler.state(module).values()}
    packings = {ops.packing_for(device) for device in devices}
    if len(packings) == 1 and (packing := packings.pop()) is not None:
        packing.initialize(model)


def converted_modules(model: nn.Module) -> dict[str, tuple[Any, ModuleHandler]]:
    """Every converted module with its handler, by qualified name; of several, that which was registered last."""
    found = {
        name: (each, handler) for handler in reversed(_handlers) for name, each in handler.converted(model).items()
    }
    return _without_parts(found)


def _without_parts(found: dict[str, tuple[Any, ModuleHandler]]) -> dict[str, tuple[Any, ModuleHandler]]:
    """Modules with their handlers by name, less those that are parts of others."""
    parts = {id(part) for module, handler in found.values() for part in handler.parts(module)}
    return {name: entry for name, entry in found.items() if id(entry[0]) not in parts}
