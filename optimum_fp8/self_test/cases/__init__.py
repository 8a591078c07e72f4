"""The cases of the self-test, one file a family of operators; each has a function `cases(fmt)`."""

from collections.abc import Iterator

from ...formats import NumberFormat
from ..case import Case
from . import attention, casts, conv, embedding, experts, golden, grouped_linear, linear, linear_gradient, ranges

_FAMILIES = (golden, casts, ranges, linear, linear_gradient, conv, embedding, attention, experts, grouped_linear)


def all_cases(fmt: NumberFormat) -> Iterator[Case]:
    """Every case of a number format."""
    for family in _FAMILIES:
        yield from family.cases(fmt)
