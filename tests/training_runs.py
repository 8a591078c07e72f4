"""Trainers of tiny models, for tests: their batches have padding, and are the same in every run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

VOCABULARY = 96


def llama(**overrides: Any) -> LlamaForCausalLM:
    """The same tiny model each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes | overrides))


def rows(count: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Samples of 12 tokens, of which the last of every other one are padding."""
    made = []
    for number, ids in enumerate(
        torch.randint(3, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(seed))
    ):
        mask = torch.ones(12, dtype=torch.long)
        mask[12 - 4 * (number % 2) :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def arguments(folder: Any, made_by: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    return made_by(
        str(folder), **quiet | {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2} | options
    )


def trainer(model: nn.Module, folder: Any, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    data = {"train_dataset": rows(), "eval_dataset": rows(6, seed=2)}
    return Trainer(model, arguments(folder, **options), callbacks=list(callbacks), **data)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, after: int):
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.after


class Spy:
    """The largest magnitude of what goes into each linear layer, without padding, seen by a hook of torch's own."""

    def __init__(self, model: PreTrainedModel, training: bool):
        self.largest: dict[str, float] = {}
        self.training, self.valid = training, torch.empty(0)
        model.register_forward_pre_hook(self._mask, with_kwargs=True)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda module, args, name=name: self._see(module, name, args[0]))

    def _mask(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.valid = kwargs["attention_mask"].bool()

    def _see(self, module: nn.Module, name: str, x: torch.Tensor) -> None:
        if module.training == self.training:
            found = float(x.detach()[self.valid].abs().max())
            self.largest[name] = max(found, self.largest.get(name, 0.0))


def hooked(model: nn.Module) -> list[str]:
    """The modules that have hooks."""
    return [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]


def logged(run: Trainer, prefix: str) -> Iterable[dict[str, float]]:
    """The entries of a Trainer's history with a value whose name begins so."""
    return [entry for entry in run.state.log_history if any(key.startswith(prefix) for key in entry)]
