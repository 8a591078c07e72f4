"""Attention in FP8: which modules compute it and how, what each call of theirs does, and their handlers."""

from importlib import import_module
from pkgutil import iter_modules

from .function import NAME, attention_forward
from .implementation import choices_by_config, chosen_before_loading
from .plan import AttentionPlan, plan_of, set_plan
from .scale_module import CHILD, scales_of, set_scales

for _file in iter_modules(__path__):  # each registers what it defines
    import_module(f".{_file.name}", __name__)

__all__ = [
    "CHILD",
    "NAME",
    "AttentionPlan",
    "attention_forward",
    "choices_by_config",
    "chosen_before_loading",
    "plan_of",
    "scales_of",
    "set_plan",
    "set_scales",
]
