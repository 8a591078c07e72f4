"""Which modules are quantized and how each of them, and why each of the others is not."""

from .batch_norm import Pair, batch_norm_pairs
from .decision import Decision, leave_out, with_limits
from .default_skips import default_skips
from .diffusion_ends import is_of_diffusers
from .schemes import scheme_for
from .select import (
    all_names,
    config_names,
    limited,
    matches_name,
    names_in_checkpoint,
    of_kinds_asked_for,
    reschemed,
    schemes_of,
    select,
    type_names,
)
from .weight_reads import read_by_owner

__all__ = [
    "Decision",
    "Pair",
    "all_names",
    "batch_norm_pairs",
    "config_names",
    "default_skips",
    "is_of_diffusers",
    "leave_out",
    "limited",
    "matches_name",
    "names_in_checkpoint",
    "of_kinds_asked_for",
    "read_by_owner",
    "reschemed",
    "scheme_for",
    "schemes_of",
    "select",
    "type_names",
    "with_limits",
]
