"""What a sound scale is: finite, above 0, and set. One rule, and one text for the messages of all who refuse others."""

from __future__ import annotations

import torch

EXPECTED = "expected finite values above 0"


def is_sound(scale: torch.Tensor) -> bool:
    """Whether every value of a scale (any shape) is finite and above 0."""
    return bool((torch.isfinite(scale) & (scale > 0)).all())


def unsound(scale: torch.Tensor) -> str | None:
    """What is wrong with a scale, as messages say it after its name; None for a sound one, or one on meta."""
    if scale.device.type == "meta" or is_sound(scale):
        return None
    return f"is {scale.flatten()[:4].tolist()}, {EXPECTED}"
