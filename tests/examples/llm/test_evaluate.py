"""The example that evaluates: perplexity by an oracle of its own, alike for any number of processes, and tasks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "llm"))

import evaluate
from evaluate import TINY_LM, main

FEW = ("--length", "32", "--samples", "6")
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/endings.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_target: label
doc_to_choice: "{{{{ends}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ENDINGS = [("def __init__(self", "):", "import"), ("for i in", " range(", "def"), ("if x is not", " None:", "import")]


def said(out: str) -> float:
    return float(out.split("perplexity ")[1].split()[0])


def in_processes(count: int, *arguments: object) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, evaluate.__file__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def test_perplexity_of_a_text_is_that_of_transformers_loss(capsys):
    main([*FEW])
    model = AutoModelForCausalLM.from_pretrained(TINY_LM)
    text = (TINY_LM / "heldout.txt").read_text()
    ids = AutoTokenizer.from_pretrained(TINY_LM)(text, return_tensors="pt", verbose=False).input_ids[0][: 6 * 32]
    losses = [model(window[None], labels=window[None]).loss.item() for window in ids.split(32)]
    assert said(capsys.readouterr().out) == pytest.approx(math.exp(sum(losses) / 6), rel=1e-3)


def test_of_rows_and_of_a_model_that_is_quantized(capsys, tmp_path):
    text = (TINY_LM / "heldout.txt").read_text()[:4000]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"code": part}) for part in text.split("\n\n")))
    (tmp_path / "rows.txt").write_text(text)
    found = []
    for data in (["rows.jsonl", "--text_column", "code"], ["rows.txt"]):
        main([*FEW, "--fp8", "dynamic", "--data", str(tmp_path / data[0]), *data[1:]])
        out = capsys.readouterr().out
        found.append(said(out))
        assert "28 of 29 candidate modules in FP8" in out
    assert found[0] == found[1]


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"code": "import os"}')
    with pytest.raises(SystemExit, match="--text_column text.*code"):
        main(["--data", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit, match="--length 256: the text has only"):
        main(["--data", str(tmp_path / "rows.jsonl"), "--text_column", "code"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"lm-eval, which is not installed: pip install .optimum-fp8\[eval\]"):
        main(["--tasks", "piqa"])


@pytest.mark.slow
def test_two_processes_share_the_batches_and_find_the_same(capsys):
    main([*FEW, "--batch-size", "2", "--fp8", "dynamic"])
    assert said(in_processes(2, *FEW, "--batch-size", "2", "--fp8", "dynamic")) == said(capsys.readouterr().out)


@pytest.mark.slow
@torch.no_grad()
def test_a_task_of_ones_own(tmp_path, capsys):
    (tmp_path / "endings.yaml").write_text(TASK.format(folder=tmp_path))
    rows = [{"start": start, "ends": [right, wrong], "label": 0} for start, right, wrong in ENDINGS]
    (tmp_path / "endings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["--tasks", "endings", "--include_path", str(tmp_path)])
    out = capsys.readouterr().out

    tokenizer, model = AutoTokenizer.from_pretrained(TINY_LM), AutoModelForCausalLM.from_pretrained(TINY_LM)
    right = 0
    for start, *ends in ENDINGS:
        likelihoods = []
        for end in ends:
            ids = tokenizer(start + end, return_tensors="pt").input_ids
            log_p = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
            likelihoods.append(log_p[len(tokenizer(start).input_ids) - 1 :].sum().item())
        right += likelihoods[0] > likelihoods[1]
    found = [line.split("|")[7].strip() for line in out.splitlines() if "|endings|" in line]
    assert [float(each) for each in found] == [pytest.approx(right / len(ENDINGS), abs=1e-4)], (right, out)
