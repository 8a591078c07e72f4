"""Linear layers and convolutions of classes whose own forward goes through the product of the class they derive from.

The own forward runs as it is: it pads, transposes, masks or routes. What it calls `super().forward` for, or the
`_conv_forward` of torch with its own weight, is the product in FP8; whatever else it does with its weight is done with
values. A class that computes the product by another function is known by a row of `EQUIVALENTS`, which says the same
in terms of the product.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from ..ops.fp8_tensor import FP8Tensor
from .class_source import class_tree

Product = Callable[..., torch.Tensor]
Forward = Callable[..., Any]


def _idefics(module: Any, product: Product, input: torch.Tensor) -> torch.Tensor:
    """Some outputs are of a layer beside it, where there are any."""
    output = product(input)
    return torch.cat((output, module.additional_fc(input)), -1) if module.out_additional_features > 0 else output


# By the name of a class: what its forward computes, given the module, the product of the class it derives from (with
# weight and bias), and what it is called with.
EQUIVALENTS: dict[str, Forward] = {
    "FalconLinear": lambda module, product, input: product(input),
    "IdeficsDecoupledLinear": _idefics,
}


def register_equivalent(cls: type[nn.Module] | str, forward: Forward | None = None) -> None:
    """Declare what the own forward of a class computes: a subclass of nn.Linear or of a convolution.

    Args:
        cls: the class; of a name, every class that is called so.
        forward: given a module, the product of the class that it derives from (with its weight and bias), and what the
            module is called with, returns what its own forward does. None: it computes just the product.
    """
    just_that: Forward = lambda module, product, input: product(input)  # noqa: E731
    EQUIVALENTS[cls if isinstance(cls, str) else _path(cls)] = forward or just_that


def equivalent_of(cls: type) -> Forward | None:
    """What is declared of a class; None: nothing."""
    return EQUIVALENTS.get(_path(cls), EQUIVALENTS.get(cls.__name__))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_known(cls: Any) -> bool:
    """Whether `run_own` runs the own forward of a class through its product."""
    return equivalent_of(cls) is not None or _goes_through_product(cls)


@cache
def _goes_through_product(cls: Any) -> bool:
    """Whether the source of a class's own forward calls `super().forward`, or `self._conv_forward`."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    tree = class_tree(owner)
    forwards = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if tree is not None else []
    nodes = [node for each in forwards if each.name == "forward" for node in ast.walk(each)]
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    return any(call in ("super().forward", "self._conv_forward") for call in calls)


@cache
def _acting_class(cls: Any, base: Any) -> Any:
    """A class with the own forward of `cls`, for which `super().forward` and its own `_conv_forward` are the product.

    An instance stands in a module's place while that forward runs: `_fp8_module` is the module, `_fp8_product` the
    product.
    """

    class WithProduct(base):  # type: ignore[misc]
        weight = property(lambda self: self._fp8_module.weight)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._fp8_product(*args, **kwargs)

        def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
            own = self._fp8_module._parameters
            if _is_held(weight, own["weight"]) and bias is own.get("bias"):
                return self._fp8_product(input)
            return super()._conv_forward(input, weight, bias)

    return type(cls.__name__, (cls, WithProduct), {"__slots__": ("_fp8_module", "_fp8_product")})


def _is_held(weight: Any, held: Any) -> bool:
    return weight is held or (isinstance(weight, FP8Tensor) and weight.codes is held)


def run_own(module: Any, origin: Any, product: Product, *args: Any, **kwargs: Any) -> Any:
    """The own forward of a module's class, with `product` in the place of that of the class it derives from.

    Args:
        module: the original, or what stands for it.
        origin: the original, or a shell of it.
        product: given an input, the product.
        args: what the module is called with.
        kwargs: the same by name.
    """
    cls: Any = type(origin)
    if (declared := equivalent_of(cls)) is not None:
        return declared(module, product, *args, **kwargs)
    acting_class = _acting_class(cls, torch_class(cls))
    acting = acting_class.__new__(acting_class)
    object.__setattr__(acting, "__dict__", module.__dict__)  # what it sets is set on the module
    acting_class._fp8_module.__set__(acting, module)
    acting_class._fp8_product.__set__(acting, product)
    return acting_class.forward(acting, *args, **kwargs)


def torch_class(cls: type) -> Any:
    """The class of torch that a class derives from."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn."))


def measured(module: Any, see: Callable[[str, torch.Tensor], None], *args: Any, **kwargs: Any) -> Any:
    """The forward pass in high precision; `see` is given what goes into the product, and what comes out of it."""

    def product(input: torch.Tensor) -> torch.Tensor:
        see("input", input)
        output = torch_class(type(module)).forward(module, input)
        see("output", output)
        return output  # type: ignore[no-any-return]

    return run_own(module, module, product, *args, **kwargs)
