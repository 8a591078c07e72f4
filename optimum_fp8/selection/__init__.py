"""Which modules are quantized and how each of them, and why each of the others is not."""

from .decision import Decision, leave_out
from .schemes import scheme_for
from .select import (
    all_names,
    config_names,
    default_skips,
    matches_name,
    names_in_checkpoint,
    of_kinds_asked_for,
    reschemed,
    schemes_of,
    select,
    type_names,
)

__all__ = [
    "Decision",
    "all_names",
    "config_names",
    "default_skips",
    "leave_out",
    "matches_name",
    "names_in_checkpoint",
    "of_kinds_asked_for",
    "reschemed",
    "scheme_for",
    "schemes_of",
    "select",
    "type_names",
]
