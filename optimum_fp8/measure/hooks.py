"""Hooks that measure the inputs and outputs of modules, and leave no trace when they are removed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .experts import ExpertTokens, number_of_experts, tokens_of_experts
from .fingerprint import whole
from .padding import Padding
from .seen import Seen
from .store import Measurements

logger = logging.getLogger(__name__)

_OPERANDS = ("q", "k", "v", "p")  # of products, with or without a number
_MASK = "attention_mask"  # models have other masks too, which say where images are, for example


class Observers:
    """Forward hooks that measure inputs and outputs of modules into `measurements` until `remove()`.

    Args:
        measurements: where ranges are kept.
        kinds: which tensors of a layer are measured, of "input", "output" and "weight".
        fingerprint: gives that of the model; called when the first tensor is measured.
        all_experts: whether each of several experts whose weights are stacked is measured with all tokens, and not
            just with those that are sent to it.

    Attributes:
        began_with: the fingerprint of the model whose activations were measured first; None as long as none were.
        paused: whether what goes through modules is not measured at present.
    """

    def __init__(
        self,
        measurements: Measurements,
        kinds: Iterable[str] = ("input", "weight"),
        fingerprint: Callable[[], str] | None = None,
        *,
        all_experts: bool = False,
    ):
        self.measurements, self.kinds, self.all_experts = measurements, frozenset(kinds), all_experts
        self.began_with: str | None = None
        self.paused = False
        self._fingerprint = fingerprint
        self._weights: dict[str, tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = {}
        self._handles: list[Any] = []
        self._inputs: list[tuple[str, nn.Module, int]] = []
        self._counted: set[str] = set()
        self._padding = Padding()
        self._seen = Seen()

    def attach(self, name: str, module: nn.Module, *, outputs: bool = True) -> None:
        """Measure what goes into the module called `name`, and (`outputs`) what comes out of it, as `kinds` says; of
        several outputs the first."""
        if "input" in self.kinds:
            hook = partial(self._observe_input, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._inputs.append((name, module, self._handles[-1].id))
        if outputs and "output" in self.kinds:
            self._handles.append(module.register_forward_hook(partial(self._observe_output, name)))

    def attach_weight(
        self, name: str, module: nn.Module, weight_of: Callable[[Any], torch.Tensor] = lambda module: module.weight
    ) -> None:
        """Measure the weight of the module called `name`, now and whenever `measure_weights` is called.

        Args:
            name: the module's name.
            module: what holds it.
            weight_of: its weight, `[out, in, …]`.
        """
        if "weight" in self.kinds:
            self._weights[name] = module, weight_of
            self.measurements.observe(name, "weight", whole(weight_of(module)).detach())

    def measure_weights(self) -> None:
        """Measure weights anew: they have changed."""
        for name, given in self._weights.items():
            self.measurements.tensors.pop((name, "weight"), None)
            self.attach_weight(name, *given)

    @property
    def is_attached(self) -> bool:
        """Whether anything is observed."""
        return bool(self._handles)

    def add(self, handle: Any) -> None:
        """Have `remove()` also call `handle.remove()`: of something else that observes for these measurements."""
        self._handles.append(handle)

    def observe(self, name: str, kind: str, x: Any) -> None:
        """Measure a tensor of any shape, without rows of padding where they show; anything else is ignored.

        Args:
            name: the module.
            kind: which of its tensors: "input", "output", or an operand of a product such as "q" or "p2".
            x: the tensor.
        """
        if not isinstance(x, torch.Tensor):
            return
        heads = kind[:1] in _OPERANDS
        self._observe(name, kind, x, lambda: self._padding.rows_of(x, heads=heads), (heads,))

    def observe_per_head(self, name: str, kind: str, x: torch.Tensor) -> None:
        """Measure an operand or the output of attention, per head and over all.

        Args:
            name: the attention module.
            kind: "q", "k", "v", "output", "k_cache" or "v_cache".
            x: `[batch, heads, length, size]`; positions of padding are left out where they show, other shapes count as
                one head.
        """
        if x.ndim != 4:
            self.observe(name, kind, x)
            return
        keys = kind in ("k", "v")

        def tokens() -> torch.Tensor:
            return self._padding.tokens_of(x.transpose(1, 2), keys=keys).reshape(-1, *x.shape[1::2])

        self._observe(name, kind, x, tokens, ("per head", keys), per_head=True)

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """What of a tensor is not padding, where that shows: `[tokens, …]`; it is not measured."""
        return self._padding.rows_of(x)

    def add_tokens(self, name: str, tokens: torch.Tensor | None = None) -> None:
        """Count tokens of the experts of a module, int64 `(experts,)`, that no hook is to count; None: later."""
        self._counted.add(name)
        if tokens is not None and not self.paused:
            self.measurements.add_experts(name, ExpertTokens(tokens=tokens))

    def watch_masks(self, model: nn.Module) -> None:
        """Also leave out what the masks say that modules of `model` give to each other, where `only_where` is active.

        Models make masks of their own for what they shorten (frames of speech), and what is at masked positions may be
        anything, NaN as well.
        """
        for module in model.modules() if self.is_attached else ():
            names = list(inspect.signature(module.forward).parameters)
            if any(name.endswith(_MASK) for name in names):
                hook = partial(self._note_masks, names)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def count_experts(self, model: nn.Module) -> None:
        """Also count the tokens that go to each expert of `model`, where modules hold the stacked weights of many."""
        for name, module in model.named_modules() if self.is_attached else ():
            if number_of_experts(module) is not None and name not in self._counted:
                hook = partial(self._count_experts, name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove all hooks; warns of others that may have changed an input after it was measured."""
        late = [name for name, module, hook in self._inputs if next(reversed(module._forward_pre_hooks), hook) != hook]
        if late and self._handles:
            logger.warning("forward pre-hooks registered after measuring began are not in the ranges of: %s", late[:8])
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def only_where(self, *masks: torch.Tensor | None, exact: bool = False) -> Iterator[None]:
        """Leave out padding while inside.

        Args:
            masks: `[batch, length]`, 0 at padded positions.
            exact: whether they are of all that there is; else keys and values may go on after the padding of a prompt.
        """
        self._padding = Padding([mask for mask in masks if mask is not None], active=True, exact=exact)
        try:
            yield
        finally:
            self._padding = Padding()

    @torch.no_grad()  # activation checkpointing counts what a forward pass keeps for its backward pass
    def _observe(
        self,
        name: str,
        kind: str,
        x: torch.Tensor,
        valid: Callable[[], torch.Tensor],
        way: tuple[Any, ...],
        *,
        per_head: bool = False,
    ) -> None:
        """Measure what `valid` leaves of `x`; once, where several modules are given the same tensor in the same way."""
        if self.paused or not x.numel():
            return
        way = (*way, *self._padding.state)
        observer = self._seen.find(x, way)
        if observer is None:
            tokens = valid()
            if not tokens.numel():
                return
            self._begin()
            observer = self.measurements.observe(name, kind, tokens, per_head=per_head)
            self._seen.keep(x, way, observer)
        else:
            self.measurements.add(name, kind, observer)

    def _begin(self) -> None:
        if self.began_with is None and self._fingerprint is not None:
            self.began_with = self._fingerprint()

    # Hooks are (partials of) methods, not closures: a deep copy of a model then records for itself.

    def _note_masks(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._padding.active:
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if name.endswith(_MASK) and isinstance(value, torch.Tensor):
                    self._padding.note(value)

    def _count_experts(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts = None if self.paused else tokens_of_experts(module, (*args, *kwargs.values()), self._padding)
        if counts is not None:
            self.measurements.add_experts(name, ExpertTokens(tokens=counts))

    def _observe_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.observe(name, "input", next(iter((*args, *kwargs.values())), None))

    def _observe_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.observe(name, "output", output[0] if isinstance(output, tuple) and output else output)
