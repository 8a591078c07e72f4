"""llama.cpp's process may die: that is an error that tells how, and costs llama.cpp's rows only."""

from __future__ import annotations

import pytest
import torch

from benchmarks import generate, machine, models, rivals, timing
from benchmarks.failures import Rivals

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
WORKER = """
import json, os, signal, sys
print(json.dumps({"system": "x", "version": "0"}), flush=True)
for line in sys.stdin:
    if json.loads(line)["do"] == %r:
        os.kill(os.getpid(), signal.SIGILL)
    print(json.dumps({"seconds": [0.5], "logits": [1.0, 2.0]}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    def start(dies_of: str) -> rivals.LlamaCpp:
        program = tmp_path / "worker.py"
        program.write_text(WORKER % dies_of)
        return rivals.LlamaCpp(tmp_path / "model.gguf", [str(program)])

    return start


def test_a_worker_that_lives_answers(worker):
    engine, prompt = worker("nothing"), torch.tensor([[1, 2]])
    assert engine.decode(prompt, 1) == engine.prefill(prompt) == 0.5
    assert engine.logits(prompt).tolist() == [1.0, 2.0]
    engine.close()


def test_a_worker_killed_by_a_signal_tells_which_as_often_as_it_is_asked(worker):
    engine, prompt = worker("decode"), torch.tensor([[1, 2]])
    assert engine.prefill(prompt) == 0.5
    for _ in range(2):
        with pytest.raises(RuntimeError, match="llama.cpp's process was killed by SIGILL .an instruction"):
            engine.decode(prompt, 1)
    engine.close()


def test_a_worker_that_does_not_start_tells_its_last_words(tmp_path):
    program = tmp_path / "worker.py"
    program.write_text("raise ModuleNotFoundError('No module named llama_cpp')")
    with pytest.raises(RuntimeError, match="ended with status 1: ModuleNotFoundError: No module named llama_cpp"):
        rivals.LlamaCpp(tmp_path / "model.gguf", [str(program)])


def test_a_side_that_dies_in_turns_leaves_the_others(worker):
    engine, prompt, optional = worker("decode"), torch.tensor([[1, 2]]), Rivals(["llama.cpp"])
    sides = {"FP8": lambda: 1.0, "llama.cpp": lambda: engine.decode(prompt, 1)}
    assert timing.interleave(sides, least=3, most=3, measure=timing.told, rivals=optional) == {"FP8": [1.0] * 3}
    assert "SIGILL" in optional.rows("decode 1")[0].baseline
    engine.close()


def test_generation_goes_on_without_rivals(tmp_path, monkeypatch, worker):
    """int8 is missing, and llama.cpp dies of its first prompt: bfloat16 and FP8 are measured all the same."""
    folder = models.llama(tmp_path, "tiny", **TINY)

    def no_int8(folder):
        raise AttributeError("torch.ao has no quantization")

    monkeypatch.setattr(models, "llama", lambda: folder)
    monkeypatch.setattr(models, "load_int8", no_int8)
    monkeypatch.setitem(generate._RIVALS, "llama.cpp", lambda folder: worker("logits"))
    monkeypatch.setattr(machine, "gemm_peak", lambda: machine.GemmPeak(1e9, 1e9))
    monkeypatch.setattr(generate, "PROMPT", 4)
    monkeypatch.setattr(generate, "LONG_PROMPT", 8)
    monkeypatch.setattr(models.prompt, "__defaults__", (TINY["vocab_size"],))
    rows, notes = generate.run(steps=2, rounds=1)
    assert [row.what for row in rows if row.ratio] == [
        *(f"decode {batch}, beside bf16" for batch in generate.BATCHES),
        "prefill, beside bf16",
        "decode 1 after 8, beside bf16",
        "decode 1 after 8, FP8 cache, beside bf16",
    ]
    failed = {row.what: row.baseline for row in rows if row.ratio is None}
    assert failed["generation, beside int8"] == "not run: AttributeError: torch.ao has no quantization"
    assert "killed by SIGILL" in failed["generation, beside llama.cpp"]
