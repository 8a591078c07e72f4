"""Distillation: a model in quantization-aware training learns the outputs of the model in high precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import FP8StateError
from ..lifecycle import unwrapped

_IGNORED = -100  # transformers' label of what counts for nothing


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of T² · KL(teacher ‖ student) of distributions that are softened by a temperature T.

    Args:
        student_logits: `[…, classes]`.
        teacher_logits: the same shape; no gradient goes there.
        temperature: above 0; the factor T² keeps gradients as large as with 1.
        weights: `[…]`, how much each distribution counts; None: all alike.

    Returns:
        a float32 scalar: the weighted sum over the distributions, divided by the sum of the weights.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    each = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2
    if weights is None:
        return each.mean()
    weights = weights.to(each.dtype)
    return (each * weights).sum() / weights.sum().clamp(min=torch.finfo(each.dtype).tiny)


class Distillation:
    """A `compute_loss_func` for transformers' Trainer: the divergence from a teacher that is given the same inputs.

    The teacher is asked when the student is called, by a hook on the student; `remove` takes it off.

    Args:
        student: the model that is trained.
        teacher: the model in high precision; it is set to evaluation, and never trained.
        temperature: of `distillation_loss`.
        next_token: whether the output at a position is about the label of the next one, as in causal language models.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, temperature: float = 1.0, next_token: bool = True):
        self.teacher, self.temperature, self.next_token = teacher.eval().requires_grad_(False), temperature, next_token
        self._logits: torch.Tensor | None = None
        self._hook = unwrapped(student).register_forward_pre_hook(self._ask, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the student."""
        self._hook.remove()

    @torch.no_grad()
    def _ask(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if student.training:
            inputs = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
            self._logits = self.teacher(*args, **inputs).logits

    def __call__(
        self, outputs: Any, labels: torch.Tensor | None, num_items_in_batch: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of a batch, over the positions whose labels count.

        Args:
            outputs: of the student, with `logits`.
            labels: of the batch; `[batch, length]` of a language model. None: every position counts.
            num_items_in_batch: labels that count in all batches of a step, by which the sum is divided; None: the mean.

        Raises:
            FP8StateError: the student was not called in training mode before.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        teacher, self._logits = self._logits, None
        if teacher is None:
            if not torch.is_grad_enabled():  # evaluation: Trainer asks for a loss as well
                return torch.zeros((), device=logits.device)
            raise FP8StateError("Distillation: the student was not called since the last loss, in training mode")
        weights = None
        if labels is not None:
            if self.next_token:
                labels = F.pad(labels[..., 1:], (0, 1), value=_IGNORED)
            weights = labels != _IGNORED
        loss = distillation_loss(logits, teacher, self.temperature, weights)
        if num_items_in_batch is None:
            return loss
        count = logits[..., 0].numel() if weights is None else weights.sum()
        return loss * count / num_items_in_batch
