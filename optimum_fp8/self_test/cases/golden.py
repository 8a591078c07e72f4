"""Casts whose codes are known: ties, subnormals, what saturates, zeros and NaN."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...formats import NumberFormat
from ...ops.arguments import CastToCall
from ..case import Case, scale

_NAN = float("nan")
# value: code. Between two codes it is the nearer one, at a tie the even one.
_E4M3 = {
    1.0: 0x38,
    1.0625: 0x38,
    1.1875: 0x3A,
    17.0: 0x58,
    19.0: 0x5A,
    2.0**-10: 0x00,
    1.5 * 2.0**-10: 0x01,
    1.5 * 2.0**-9: 0x02,
    239.9: 0x77,
    244.0: 0x77,
    _NAN: 0x7F,
}
_E4M3_TO_240 = {248.0: 0x77, 300.0: 0x77, 1e6: 0x77, -500.0: 0xF7}
_E4M3_TO_448 = {248.0: 0x78, 300.0: 0x79, 1e6: 0x7E, -500.0: 0xFE}
_E5M2 = {
    1.0: 0x3C,
    1.125: 0x3C,
    1.375: 0x3E,
    2.0**-17: 0x00,
    1.5 * 2.0**-17: 0x01,
    1.5 * 2.0**-16: 0x02,
    57344.0: 0x7B,
    1e6: 0x7B,
    -1e6: 0xFB,
    _NAN: 0x7F,
}


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `cast_to_fp8`."""
    known = _E5M2 if fmt.name == "E5M2" else _E4M3 | (_E4M3_TO_240 if fmt.full_scale == 240 else _E4M3_TO_448)
    yield _case(fmt, "golden codes", known)
    yield _case(fmt, "zeros keep their sign", {0.0: 0x00}, {-0.0: 0x80})
    last = known[1e6]
    yield _case(fmt, "infinity saturates", {float("inf"): last, float("-inf"): last + 0x80})


def _case(fmt: NumberFormat, name: str, *known: dict[float, int]) -> Case:
    """A cast of values in float32 with the scale 1 (those that are equal, as 0 and -0, in different dicts)."""
    values = [value for part in known for value in part]
    codes = torch.tensor([code for part in known for code in part.values()], dtype=torch.uint8)
    call = CastToCall(torch.tensor(values, dtype=torch.float32), scale(1.0), fmt.dtype, fmt.full_scale)
    return Case("cast_to_fp8", name, call, expected=codes.view(fmt.dtype))
