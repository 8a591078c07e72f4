"""An einsum of two operands, read as one product of matrices for each of its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch


class EinsumProduct(NamedTuple):
    """A product that computes an einsum.

    Attributes:
        left: `[…, M, K]`, the first operand as the product takes it.
        right: `[…, K, N]`, the second.
        restore: what makes the einsum's result of the product's, `[…, M, N]`.
    """

    left: torch.Tensor
    right: torch.Tensor
    restore: Callable[[torch.Tensor], torch.Tensor]


def einsum_product(equation: str, a: torch.Tensor, b: torch.Tensor) -> EinsumProduct | None:
    """The product of `a` and `b` that an equation of torch.einsum asks for; None where it is not one product.

    It is none where a dimension is repeated in one operand, or summed over in one alone.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    left, right = _labels(terms[0], a.ndim), _labels(terms[1], b.ndim)
    result = _labels(output, _elided(left, right) + len(output.replace(".", ""))) if arrow else _implied(left, right)
    shared, named = [label for label in left if label in right], {*result}
    batch = [label for label in result if label in shared]
    rows = [label for label in result if label in left and label not in right]
    columns = [label for label in result if label in right and label not in left]
    summed = [label for label in shared if label not in named]
    whole = {*left} == {*batch, *rows, *summed} and {*right} == {*batch, *columns, *summed}
    once = all(len({*labels}) == len(labels) for labels in (left, right, result))
    sizes = dict(zip(left, a.shape, strict=True)), dict(zip(right, b.shape, strict=True))
    if not (summed and whole and once) or any(sizes[0][label] != sizes[1][label] for label in summed):
        return None

    def restore(product: torch.Tensor) -> torch.Tensor:
        own = [*(sizes[0][label] for label in rows), *(sizes[1][label] for label in columns)]
        product = product.reshape(*product.shape[:-2], *own)
        order = [*batch, *rows, *columns]
        return product if order == result else product.permute([order.index(label) for label in result])

    return EinsumProduct(_arranged(a, left, batch, rows, summed), _arranged(b, right, batch, summed, columns), restore)


def has_sums(equation: str) -> bool:
    """Whether an equation sums over something that more than one operand has: whether it is a product at all."""
    inputs, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    counts = Counter(label for term in inputs.split(",") for label in {*term})
    return any(count > 1 and not (arrow and label in output) for label, count in counts.items())


def _labels(term: str, ndim: int) -> list[str]:
    """A label for each dimension: letters, and "...1" for the last of those that "..." stands for, "...2" before."""
    before, dots, after = term.partition("...")
    elided = [f"...{number}" for number in range(ndim - len(before) - len(after), 0, -1)] if dots else []
    return [*before, *elided, *after]


def _elided(*operands: Sequence[str]) -> int:
    """How many dimensions "..." stands for in the result."""
    return max(sum(label.startswith("...") for label in labels) for labels in operands)


def _implied(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """The result of an equation without "->": what "..." stands for, then the letters that occur once, in order."""
    counts = Counter(label for label in (*left, *right) if not label.startswith("..."))
    return [
        *(f"...{number}" for number in range(_elided(left, right), 0, -1)),
        *sorted(label for label, count in counts.items() if count == 1),
    ]


def _arranged(x: torch.Tensor, labels: Sequence[str], batch: Sequence[str], *groups: Sequence[str]) -> torch.Tensor:
    """`x` with the dimensions of its batches as they are, and each group of the others as one; a view if it can be."""
    order = [labels.index(label) for label in (*batch, *groups[0], *groups[1])]
    x = x if order == sorted(order) else x.permute(order)
    if all(len(group) == 1 for group in groups):
        return x
    sizes, start = list(x.shape[: len(batch)]), len(batch)
    for group in groups:
        sizes.append(prod(x.shape[start : start + len(group)]))
        start += len(group)
    return x.reshape(sizes)
