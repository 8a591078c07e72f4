"""The pieces run on tiny models and weights, and refuse to time what computes something else."""

from __future__ import annotations

from pathlib import Path

import fresh
import pytest
import torch
import torch.nn.functional as F
from hf.conftest import llama

from benchmarks import (
    attention,
    bf16_cache,
    calibrate,
    cpu_casts,
    cpu_linear,
    experts,
    generate,
    loading,
    machine,
    memory,
    models,
    overhead,
    rivals,
    vllm_cpu,
)
from benchmarks.failures import Rivals

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@pytest.fixture
def folder(tmp_path):
    return models.llama(tmp_path, "tiny", **TINY)


@pytest.fixture
def few_copies(monkeypatch):
    monkeypatch.setattr(machine, "cold_copies", lambda nbytes: 3)


@pytest.fixture
def known_peak(monkeypatch):
    monkeypatch.setattr(machine, "gemm_peak", lambda measure=None: machine.GemmPeak(1e9, 1e9))


@pytest.mark.slow
def test_all_parts_are_importable_without_the_extra():
    """gguf and llama_cpp are asked for where they are used, never by looking at a command's help."""
    script = (
        "import sys; sys.modules['gguf'] = sys.modules['llama_cpp'] = None\n"
        "from benchmarks.__main__ import parser\n"
        "parser().parse_args(['--only', 'linear'])"
    )
    fresh.TRANSFORMERS.run(script, folder=ROOT)


def test_linear_makes_a_row_for_each_kind_of_scale(few_copies):
    rows = cpu_linear.measure(cpu_linear.Weights.of((32, 64)), rows=1, peak=1e9, static=True, budget=0)
    assert [row.what.split(" (")[0] for row in rows] == [
        f"linear M=1 32x64, scale per {name}" for name in ("tensor", "channel", "channel, static")
    ]
    assert all(row.wanted == 3.3 and row.wanted_limit == 0.8 and row.ratio and row.limit for row in rows)


def test_linear_has_blocks_and_groups_beside_channels_on_the_same_kernel(few_copies):
    rows = cpu_linear.measure(cpu_linear.Weights.of((32, 256)), rows=2, peak=1e9, static=False, budget=0, blocks=True)
    assert [row.what.split("per ")[1].split(", dynamic")[0] for row in rows[2:]] == list(cpu_linear._DYNAMIC)


def test_linear_compares_only_equal_results(few_copies):
    weights, x = cpu_linear.Weights.of((32, 64)), torch.randn(4, 64).bfloat16()
    cpu_linear.check(cpu_linear.sides_of(weights, x, static=True, blocks=True))
    weights.scales["channel"] *= 2
    with pytest.raises(RuntimeError, match="channel"):
        cpu_linear.check(cpu_linear.sides_of(weights, x, static=False))


def test_linear_measures_another_variant(few_copies, known_peak, monkeypatch, capsys):
    options = ["--rows", "2", "--shapes", "32x64", "--budget", "0", "--backend", "cpu_portable"]
    monkeypatch.setattr("sys.argv", ["cpu_linear", *options])
    cpu_linear.main()
    assert "scale per tensor (cpu_portable)" in capsys.readouterr().out


def test_casts_make_a_row_for_each_operation(few_copies):
    rows, notes = cpu_casts.run(budget=0, shape=(16, 32))
    assert len({row.what for row in rows}) == len(rows) == 10
    assert all(row.limit and row.wanted_limit == 0.6 for row in rows)
    assert "copying" in notes[0] and "reading" in notes[0]


def test_linear_is_exact_where_wrong_codes_are_counted():
    def product(x, codes):
        return x @ codes.to(x.dtype).t()

    assert cpu_linear.wrong_codes(product) == 0
    assert (
        cpu_linear.wrong_codes(lambda x, codes: product(x, codes) + (product(x, codes) == 0) / 128) == 2
    )  # both zeros


def test_error_of_a_product_is_that_beside_float64(few_copies):
    weights, x = cpu_linear.Weights.of((32, 64)), torch.randn(4, 64).bfloat16()
    exact = F.linear(x.double(), weights.plain.take().double())
    assert cpu_linear.largest_error(lambda: exact, weights, x) == 0
    assert cpu_linear.largest_error(lambda: exact * 1.01, weights, x) == pytest.approx(0.01)
    assert cpu_linear.largest_error(cpu_linear.sides_of(weights, x, False)["tensor"], weights, x) < 2**-8


def test_vllm_that_cannot_run_costs_its_rows(few_copies, known_peak, monkeypatch):
    def killed(library, operator):
        raise RuntimeError(f"vLLM's {operator} was killed by SIGILL")

    monkeypatch.setattr(vllm_cpu, "load", killed)
    rows, _ = cpu_linear.run(((32, 64),), rows=(1,), budget=0, library="_C.so")
    assert [row.what.split(" (")[0] for row in rows[:2]] == [
        f"linear M=1 32x64, scale per {name}" for name in ("tensor", "channel")
    ]
    rows += attention.run((attention.Heads(2, 2, 32),), (50,), (40,), budget=0, library="_C.so")[0]
    rows += experts.run(experts.Shape(8, 2, 64, 32), tokens=(1,), budget=0, library="_C.so")[0]
    assert {row.what: row.baseline for row in rows if row.ratio is None} == {
        "linear layers, beside vLLM": "not run: vLLM's linear was killed by SIGILL",
        "attention, beside vLLM bf16": "not run: vLLM's attention was killed by SIGILL",
        "attention, beside vLLM FP8": "not run: vLLM's attention over FP8 was killed by SIGILL",
        "experts, beside vLLM bf16": "not run: vLLM's experts was killed by SIGILL",
    }


def test_attention_makes_a_row_for_each_shape_length_and_other_side(few_copies, known_peak):
    shapes = (attention.Heads(4, 2, 32), attention.Heads(2, 2, 32))
    rows, notes = attention.run(shapes, tokens=(50, 60), prompts=(40,), budget=0)
    others = (attention.SDPA, attention.BY_HAND, attention.READING_BF16, attention.OUR_BF16)
    assert [row.baseline.startswith(name) for row, name in zip(rows, others * 4, strict=False)] == [True] * 16
    wanted = [(1.7, 0.7), *[(None, None)] * 2, (1.6, None)]
    assert [(row.wanted, row.wanted_limit) for row in rows] == wanted * 4 + [(0.9, None)]
    assert all(row.ratio and row.limit for row in rows) and "SDPA" in notes[0]
    assert all(("% of reading, error 0." in row.baseline) == (row.wanted == 1.6) for row in rows)


def test_attention_without_a_compiler_costs_a_row(few_copies, known_peak, monkeypatch):
    monkeypatch.setattr(bf16_cache, "load", lambda: bf16_cache._compile("portable", ROOT / "unused.so"))
    monkeypatch.setenv("CC", "no_such_cc")
    rows, _ = attention.run((attention.Heads(2, 2, 32),), (50,), (40,), budget=0)
    assert {row.what: row.baseline for row in rows if row.ratio is None} == {
        f"attention, beside {attention.OUR_BF16}": "not run: no C compiler 'no_such_cc'"
    }
    assert len(rows) == 3 + 1 + 1


@pytest.mark.parametrize("queries", [1, 5])
def test_attention_in_float64_and_by_hand_is_that_of_torch(queries):
    query, cache = (
        torch.randn(1, 4, queries, 32).bfloat16(),
        attention.plain(attention.codes(attention.Heads(4, 2, 32), 9)),
    )
    mask = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    expected = F.scaled_dot_product_attention(query.double(), *(x.double() for x in cache), mask, enable_gqa=True)
    torch.testing.assert_close(attention.exact(query, *cache), expected.transpose(1, 2))
    assert attention.error(expected.transpose(1, 2), attention.exact(query, *cache)) == ", error 0.00%"
    if queries == 1:
        attention.check(attention.by_hand(query, *cache).transpose(1, 2), expected)


def test_attention_compares_only_equal_results():
    heads, query = attention.Heads(4, 2, 32), torch.randn(1, 4, 9, 32).bfloat16()
    cache = attention.codes(heads, 9)
    expected = F.scaled_dot_product_attention(query, *attention.plain(cache), is_causal=True, enable_gqa=True)
    found = attention.fp8_attention(query, *cache)
    attention.check(found, expected)
    with pytest.raises(RuntimeError, match="off bfloat16"):
        attention.check(found * 1.1, expected)


def test_experts_make_a_row_for_each_kind_of_activations(known_peak):
    rows, notes = experts.run(experts.Shape(8, 2, 64, 32), tokens=(1, 4, 9), budget=0)
    assert [row.what.split(" (")[0] for row in rows] == [
        f"experts, {tokens}, {name}"
        for tokens in ("1 token", "4 tokens", "9 tokens")
        for name in ("weight-only", "static", "dynamic")
    ]
    assert all(row.ratio for row in rows) and [row.wanted for row in rows[6:]] == [0.95] * 3
    for row in rows[:6]:  # either of two wishes: that which is met is not asked for
        assert (row.wanted is None) == (row.limit >= 0.8) and (row.wanted_limit is None) == (row.ratio >= 2.5)
    assert "8 of 64 x 32, 2 a token" in notes[0]


def test_experts_compare_only_equal_results():
    shape = experts.Shape(8, 2, 64, 32)
    weights, x = experts.Weights.random(shape), torch.randn(4, 64).bfloat16()
    route = experts.routes(shape, 4).take()
    assert route[0].unique().numel() == 8
    found = experts.fp8(weights, x, "weight-only", experts.ops.CallRecord())(route)
    expected = experts.grouped_mm_experts_forward(weights.plain, x, *route)
    experts.check(found, expected, "weight-only")
    with pytest.raises(RuntimeError, match="weight-only.* off bfloat16"):
        experts.check(found * 1.1, expected, "weight-only")


def test_transformers_decodes_and_prefills(folder):
    engine = rivals.Transformers(models.load(folder))
    prompt = models.prompt(2, 5, TINY["vocab_size"])
    assert engine.decode(prompt, 3) > 0
    assert len(engine._moments(prompt, 4)) == 5  # the start, and every token: no end token cuts it short
    assert engine.prefill(prompt) > 0
    assert engine.logits(prompt[:1]).shape == (TINY["vocab_size"],)


def test_tiny_linear_layers_are_what_they_are_called():
    assert type(overhead.tiny_linear(None)) is torch.nn.Linear
    for name in ("weight_only", "static", "dynamic"):
        assert overhead.tiny_linear(name).activations == name
    assert [row.what.split(", ")[1] for row in overhead.linear_alone(1)] == list(overhead.LAYERS)


def test_models_are_made_once(folder, tmp_path):
    before = (folder / "config.json").stat().st_mtime_ns
    assert models.llama(tmp_path, "tiny", **TINY) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    elements = sum(parameter.numel() for parameter in llama(**TINY).parameters())
    assert 2 * elements <= models.weight_bytes(folder) <= 2 * elements + 10_000


@pytest.mark.parametrize("scale_method", [models.SCALES_PER_CHANNEL, models.SCALES_PER_TENSOR])
def test_fp8_is_weight_only_with_its_head_and_counts_its_kernels(folder, scale_method):
    model = models.load(folder, scale_method)
    assert len(generate.linear_weights(model)) == 2 * 7 + 1
    rivals.Transformers(model).logits(models.prompt(1, 5, TINY["vocab_size"]))
    assert generate.kernels(model).endswith(f": {2 * 7 + 1} calls")


def test_only_sides_that_compute_the_same_model_are_timed(folder, monkeypatch):
    monkeypatch.setattr(models, "HALF_BILLION", TINY)
    monkeypatch.setattr(generate.models, "prompt", lambda batch, length: torch.arange(length).repeat(batch, 1))
    sides = {
        "bf16": rivals.Transformers(models.load(folder)),
        "FP8": rivals.Transformers(models.load(folder, "maxabs_hw")),
    }
    assert generate.likeness(sides, Rivals(()))["FP8"] > generate.LIKENESS
    sides["int8"] = rivals.Transformers(llama(**TINY))
    with pytest.raises(RuntimeError, match="int8 does not compute the same model"):
        generate.likeness(sides, Rivals(()))
    optional = Rivals(["int8"])
    assert "int8" not in generate.likeness(sides, optional) and "same model" in optional.reasons["int8"]


def test_int8_has_quantized_all_linear_layers(folder):
    model = models.load_int8(folder)
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]


def test_comparison_has_wishes_where_they_belong():
    times = {"FP8": [1.0, 1.0], "bf16": [3.0, 3.0], "llama.cpp": [0.5, 0.5], "read": [0.5, 0.5]}
    rows = generate.compare("decode 1, compiled", times, str, 0.5, "reading", generate.WANTED)
    assert [(row.ratio, row.wanted, row.limit) for row in rows] == [(3.0, 3.0, 0.5), (0.5, 0.9, None)]
    compiled = {"FP8": [1.0], "bf16": [3.0], generate.EAGER: [1.5]}
    wanted = {**generate.WANTED, **generate.WANTED_COMPILED}
    rows = generate.compare("decode 8, compiled", compiled, str, 0.5, "reading", wanted)
    assert [(row.ratio, row.wanted) for row in rows] == [(3.0, 2.0), (1.5, 1.0)]
    times[generate.CACHED] = [0.75, 0.75]
    rows = generate.compare("decode 1 after 512", times, str, None, "", generate.WANTED, generate.CACHED)
    assert [(row.ours, row.ratio, row.wanted) for row in rows] == [("0.75", 4.0, None), ("0.75", 0.5 / 0.75, None)]


def test_calibration_is_held_against_the_same_passes(folder, monkeypatch):
    monkeypatch.setattr(models, "llama", lambda: folder)
    rows, _ = calibrate.run(samples=2, length=8, rounds=1)
    assert [(row.what, row.wanted) for row in rows] == [
        ("observe with maxabs, 2 samples of 8 tokens", 1.05),
        ("calibrate with maxabs, 2 samples of 8 tokens", 1.1),
        ("observe with mse, 2 samples of 8 tokens", 1.1),
        ("calibrate with mse, 2 samples of 8 tokens", 1.1),
    ]
    model = models.load(folder)
    sides = calibrate.sides_of(model, calibrate.rows_of(2, 8, TINY["vocab_size"]))
    twin = sides["observe mse"].args[0]
    assert twin.lm_head.weight is model.lm_head.weight and "mse" in repr(twin._optimum_fp8_state.measurements)
    sides["calibrate mse"]()
    assert twin._optimum_fp8_state.measurements.samples == 2


def test_floor_of_loading_reads_every_tensor(folder):
    read: list[int] = []
    loading.read_and_cast(folder, lambda tensor: read.append(2 * tensor.numel()))
    assert models.weight_bytes(folder) - 10_000 <= sum(read) <= models.weight_bytes(folder)


def test_import_seconds_counts_the_statements_only():
    assert 0.2 <= loading.import_seconds("time.sleep(0.2)") < 1.2


def test_anonymous_memory_is_read_from_a_status():
    assert memory.anonymous("VmRSS:\t 99 kB\nRssAnon:\t    12 kB\nRssFile:\t 3 kB\n") == 12 * 1024
    with pytest.raises(RuntimeError, match="no RssAnon"):
        memory.anonymous("Name:\tzombie\n")


@pytest.mark.slow
def test_peak_of_a_fresh_process(folder):
    saved = models.in_fp8(folder, models.SCALES_PER_TENSOR)
    assert memory.peak("FP8 checkpoint", saved, models.SCALES_PER_TENSOR).peak > 50 * machine.MIB
    found = memory.peak("FP8", folder, models.SCALES_PER_TENSOR)
    assert 50 * machine.MIB < found.base < found.imports < found.peak < found.imports + 500 * machine.MIB
