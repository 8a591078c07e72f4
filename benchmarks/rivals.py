"""What others offer for the same job, behind the same two questions: how long is a step, how long is a prompt."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from . import machine, timing
from .failures import end_of

ROOT = Path(__file__).parents[1]


class Engine(Protocol):
    """Something that generates."""

    def decode(self, prompt: torch.Tensor, steps: int) -> float:
        """Median seconds of a step that gives every row of `prompt` `[batch, length]` one more token, greedily."""

    def prefill(self, prompt: torch.Tensor) -> float:
        """Seconds until the first new token."""

    def logits(self, prompt: torch.Tensor) -> torch.Tensor:
        """Logits `[vocabulary]`, float32, of the token after a prompt `[1, length]`."""


class _Clock:
    """A stopping criterion of `generate` that never stops it, and notes when each token was there."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    """A model of transformers, through `generate`: what its users get."""

    def __init__(self, model: Any, compiled: bool = False):
        self.model, self.options = model, {"cache_implementation": "static"} if compiled else {}
        if compiled:
            with torch.no_grad():  # where `generate` compiles by itself, prompts go through the model as it is
                model(torch.zeros(1, 2, dtype=torch.int64))
            torch._dynamo.config.recompile_limit = 64  # every model and shape counts: above, dynamo gives up silently
            model.forward = torch.compile(model.forward, dynamic=False)

    def _moments(self, prompt: torch.Tensor, tokens: int) -> list[float]:
        clock = _Clock()
        start = time.perf_counter()
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[clock],
            **self.options,
        )
        return [start, *clock.moments]

    def decode(self, prompt: torch.Tensor, steps: int) -> float:
        moments = self._moments(prompt, steps + 1)[1:]
        return timing.median([after - before for before, after in zip(moments, moments[1:], strict=False)])

    def prefill(self, prompt: torch.Tensor) -> float:
        start, first = self._moments(prompt, 1)
        return first - start

    @torch.no_grad()
    def logits(self, prompt: torch.Tensor) -> torch.Tensor:
        return self.model(prompt).logits[0, -1].float()


class LlamaCpp:
    """llama.cpp, in a child process that sleeps while it is not asked.

    Raises:
        RuntimeError: (from any method) the child has ended, which tells how; llama.cpp, where it was built for another
            processor, is killed by a signal.
    """

    def __init__(self, path: Path, program: Sequence[str] = ("-m", "benchmarks.llama_cpp_worker")):
        command = [sys.executable, *program, str(path), "--threads", str(machine.THREADS)]
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self.about: dict[str, str] = self._read()

    @property
    def pid(self) -> int:
        return self._child.pid

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> RuntimeError:
        status = self._child.wait()
        self._stderr.seek(0)
        return RuntimeError(
            f"llama.cpp's process {end_of(status, self._stderr.read())}; it needs the extra `benchmark`, built here"
        )

    def ask(self, do: str, prompt: torch.Tensor, **details: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, "prompt": prompt.tolist(), **details}) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._read()

    def decode(self, prompt: torch.Tensor, steps: int) -> float:
        return timing.median(self.ask("decode", prompt, steps=steps)["seconds"])

    def prefill(self, prompt: torch.Tensor) -> float:
        return self.ask("prefill", prompt)["seconds"][0]

    def logits(self, prompt: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.ask("logits", prompt)["logits"])

    def close(self) -> None:
        """End the child, and wait until it has."""
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what was not taken by a child that has ended
                self._child.stdin.close()
        self._child.wait()
        self._stderr.close()
