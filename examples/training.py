"""The loop that trains the tiny models of the examples."""

import math
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm


def fit(
    model: nn.Module,
    loss_of_batch: Callable[[], torch.Tensor],
    steps: int,
    *,
    warmup: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Run AdamW with a warm-up of so many steps and a cosine decay; each call of `loss_of_batch` draws a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
    )
    model.train()
    progress = tqdm(range(steps), desc=type(model).__name__, mininterval=5)
    for step in progress:
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after_step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()
