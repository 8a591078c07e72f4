"""FP8 in the course of a training: what transformers' Trainer is given, as a callback and as a loss."""

from .callback import FP8Callback
from .distillation import Distillation, distillation_loss

__all__ = ["Distillation", "FP8Callback", "distillation_loss"]
