"""llama.cpp in a process of its own, which measures when it is told to and sleeps otherwise.

It must not share a process with torch: each brings its own OpenMP threads, which would fight for the cores. One JSON
object a line comes in, one goes out:

    {"do": "decode", "prompt": [[…], …], "steps": 24}  ->  {"seconds": […]}      each step's, for all rows at once
    {"do": "prefill", "prompt": [[…]]}                 ->  {"seconds": [one]}
    {"do": "logits", "prompt": [[…]]}                  ->  {"logits": […]}       of the token after the prompt

Run by `rivals.LlamaCpp`: `python -m benchmarks.llama_cpp_worker model.gguf --threads 2`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

MAX_ROWS = 8
CONTEXT = 1024  # tokens a row


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp tells hundreds of lines while loading."""


class Model:
    """A GGUF file and a context for up to `MAX_ROWS` rows of tokens."""

    def __init__(self, path: str, threads: int):
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}: write it anew with benchmarks.gguf_model.convert")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * MAX_ROWS, MAX_ROWS
        params.n_threads = params.n_threads_batch = threads
        params.n_batch = params.n_ubatch = 512
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context for this model")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(CONTEXT * MAX_ROWS, 0, 1)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def feed(self, rows: list[list[int]], position: int) -> None:
        """Compute rows of tokens that stand at `position` and after it, with the logits of each row's last one."""
        batch, count = self.batch, 0
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = token, position + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = offset == len(tokens) - 1
                count += 1
        batch.n_tokens = count
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with status {status} on {count} tokens")

    def logits(self, index: int) -> np.ndarray:
        """Logits at a token of the last batch (-1: its last)."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))


def decode(model: Model, prompt: list[list[int]], steps: int) -> list[float]:
    """Greedy steps after the prompt; how long each took, the choice of the next token included."""
    model.forget()
    length, rows, seconds = len(prompt[0]), len(prompt), []
    model.feed(prompt, 0)
    tokens = [int(model.logits(length * (row + 1) - 1).argmax()) for row in range(rows)]
    for step in range(steps):
        start = time.perf_counter()
        model.feed([[token] for token in tokens], length + step)
        tokens = [int(model.logits(row).argmax()) for row in range(rows)]
        seconds.append(time.perf_counter() - start)
    return seconds


def prefill(model: Model, prompt: list[list[int]]) -> float:
    model.forget()
    start = time.perf_counter()
    model.feed(prompt, 0)
    model.logits(-1).argmax()  # waits for the result
    return time.perf_counter() - start


def answer(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "decode":
            return {"seconds": decode(model, request["prompt"], request["steps"])}
        case "prefill":
            return {"seconds": [prefill(model, request["prompt"])]}
        case "logits":
            model.forget()
            model.feed(request["prompt"], 0)
            return {"logits": model.logits(-1).tolist()}
    raise ValueError(f"nothing to do is called {request['do']!r}: expected decode, prefill or logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = Model(options.model, options.threads)
    print(
        json.dumps({"system": llama_cpp.llama_print_system_info().decode(), "version": llama_cpp.__version__}),
        flush=True,
    )
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
