"""When ranges no longer move: what is compared with what, the rule of "auto", going on from JSON, the messages."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fp8 import FP8Config, calibrate, convert, prepare, range_movement
from optimum_fp8.calibration.convergence import Convergence
from optimum_fp8.errors import FP8StateError
from optimum_fp8.measure import Measurements, Observer, Statistic, register_observer
from optimum_fp8.measure.observers.maxabs import MaxAbs

TINY_LM = Path(__file__).parents[2] / "examples" / "llm" / "tiny_lm"


def ranges(**values):
    measured = Measurements("model")
    for module, value in values.items():
        measured.add(module, "input", MaxAbs.from_range(torch.tensor(float(value)), 1))
    return measured


def run(convergence, range_at, samples=2000, batch=1, first=1):
    """Feed `range_at(samples)` where a look is due, until it is enough; how many samples that takes, or None."""
    for batches in range(first, samples // batch + 1):
        if convergence.is_due(batches) and convergence.note(range_at(batches * batch), batches, batches * batch):
            return batches * batch
    return None


@pytest.mark.parametrize(("stops", "eights", "step", "most"), [(True, 16, 1 / 8, 70), (False, 4, 1 / 2, 25)])
def test_it_looks_seldom_and_at_the_same_places_for_eight_processes(stops, eights, step, most):
    due = [batches for batches in range(5000) if Convergence(stops).is_due(batches)]
    assert due[:eights] == list(range(8, 8 * eights + 8, 8))
    assert all(batches % 8 == 0 for batches in due)
    steps = [(after - before) / before for before, after in zip(due[eights - 1 :], due[eights:], strict=False)]
    assert max(steps) <= step and len(due) < most


@pytest.mark.parametrize(("batch", "expected"), [(1, 32), (2, 48), (4, 96)])
def test_ranges_that_stand_still_are_enough(batch, expected):
    """32 samples, and two looks with one to compare with."""
    assert run(Convergence(stops=True), lambda samples: ranges(a=1, b=0), batch=batch) == expected


def test_ranges_that_keep_growing_are_never_enough():
    assert run(Convergence(stops=True), lambda samples: ranges(a=samples)) is None
    assert run(Convergence(stops=True), lambda samples: ranges(a=samples**0.2)) is None, "5.6 % each quarter"
    assert run(Convergence(stops=True), lambda samples: ranges(a=samples**0.1)) is not None, "2.8 %"


def test_one_in_a_hundred_may_move():
    def some_move(moving, of_all):
        return lambda samples: ranges(**{f"m{n}": samples if n < moving else 1 for n in range(of_all)})

    assert run(Convergence(stops=True), some_move(1, 100), samples=200) == 32
    assert run(Convergence(stops=True), some_move(2, 100), samples=200) is None


def test_a_jump_puts_it_off_until_it_is_in_the_first_three_quarters():
    jump = 30
    found = run(Convergence(stops=True), lambda samples: ranges(a=1 + (samples >= jump)))
    assert found * 3 / 4 >= jump and found <= 64


def test_without_auto_it_stops_nothing():
    convergence = Convergence()
    assert run(convergence, lambda samples: ranges(a=1), samples=100) is None and convergence.enough


@pytest.mark.parametrize("stops", [True, False])
def test_movement_is_that_since_three_quarters_of_the_samples(stops):
    convergence, due = Convergence(stops), []
    for batches in range(1, 1025):
        if convergence.is_due(batches):
            due.append(batches)
            convergence.note(ranges(a=math.log(batches), b=5), batches, batches)
            before = max((earlier for earlier in due if earlier <= 3 / 4 * batches), default=None)
            assert convergence.since == before
            if before is not None:
                expected = 1 - math.log(before) / math.log(batches)
                assert convergence.movement() == pytest.approx({"a/input": expected, "b/input": 0}, abs=1e-6)
    assert list(convergence.movement()) == ["a/input", "b/input"], "the largest first"
    assert len(json.dumps(convergence.state())) < 500, "few looks are kept"


@pytest.mark.parametrize(
    ("before", "now", "part"),
    [(4.0, 5.0, 0.2), (5.0, 4.0, 0.2), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (None, 1.0, 1.0), (1.0, math.inf, 1.0)],
    ids=["grown", "shrunk", "zero", "from zero", "seen late", "infinite"],
)
def test_movement_of_one_range(before, now, part):
    convergence = Convergence()
    convergence.note(ranges(b=1, **({} if before is None else {"a": before})), 8, 8)
    convergence.note(ranges(a=now, b=1), 16, 16)
    assert convergence.movement()["a/input"] == pytest.approx(part)


def test_weights_are_no_activations():
    measured = ranges(a=1)
    measured.add("a", "weight", MaxAbs.from_range(torch.tensor(1.0), 1))
    convergence = Convergence()
    for samples in (8, 16):
        convergence.note(measured, samples, samples)
    assert list(convergence.movement()) == ["a/input"]


def test_an_observer_that_cuts_off_outliers_settles_sooner():
    """The range an observer gives is what counts, not the largest value."""

    @register_observer
    class Median(Observer):
        name = "test_median"
        STATISTICS = {"total": Statistic(torch.add), "n": Statistic(torch.add)}

        def update(self, x):
            self.accumulate(total=x.abs().pow(0.2).median(), n=torch.ones(()))

        def range(self):
            return self.statistics()["total"] / self.statistics()["n"]

    values = torch.randn(256, 20, 256).pow(5)  # heavy tails: the largest value grows and grows

    def measured(observer):
        measurements = Measurements("model", observer=observer)

        def range_at(samples):
            for number in range(measurements.samples, samples):
                for module in range(20):
                    measurements.observe(f"m{module}", "input", values[number, module])
            measurements.samples = samples
            return measurements

        return range_at

    assert run(Convergence(stops=True), measured("maxabs"), samples=256) is None
    assert run(Convergence(stops=True), measured("test_median"), samples=256) < 256


@pytest.mark.parametrize("broken_off", [5, 16, 40, 100])
def test_it_goes_on_from_json_as_if_nothing_had_been(broken_off):
    def range_at(samples):
        return ranges(a=1 + (samples >= 70) / 3, b=samples > 9)

    whole, before, after = Convergence(stops=True), Convergence(stops=True), Convergence(stops=True)
    expected = run(whole, range_at)
    found = run(before, range_at, samples=broken_off)
    after.restore(json.loads(json.dumps(before.state())))
    found = found or run(after, range_at, first=broken_off + 1)
    assert found == expected
    assert found <= broken_off or after.movement() == whole.movement()


def said(caplog, range_at, samples, **options):
    caplog.set_level(logging.INFO)
    convergence = Convergence(**options)
    run(convergence, range_at, samples)
    line = convergence.say()
    (record,) = [record for record in caplog.records if record.name.endswith("convergence")]
    assert record.getMessage() == line
    return record.levelname, line


def test_the_line_names_those_that_moved_most(caplog):
    values = {f"m{n}": 1 for n in range(20)}
    level, line = said(caplog, lambda samples: ranges(**values, up=1 + (samples > 50)), 64)
    assert level == "INFO"
    assert line == (
        "over the last 16 of 64 samples, 1 of 21 ranges moved by more than 5% (most: up/input 50.0%, m0/input 0.0%, "
        "m1/input 0.0%)"
    )


def test_a_warning_where_many_still_moved(caplog):
    level, line = said(caplog, lambda samples: ranges(a=samples, b=1), 64)
    assert level == "WARNING" and "1 of 2 ranges moved" in line and line.endswith("that cuts off outliers")


@pytest.mark.parametrize(
    ("growing", "level", "start"), [(0, "INFO", "32 samples are en"), (1, "WARNING", "128 samples are not en")]
)
def test_auto_says_how_many_it_took(caplog, growing, level, start):
    found, line = said(caplog, lambda samples: ranges(a=1 + growing * samples), 128, stops=True)
    assert found == level and line.startswith(f'num_calibration_samples="auto": {start}ough; over the last ')


def test_nothing_is_said_of_few_batches(caplog):
    convergence = Convergence()
    convergence.note(ranges(a=1), 3, 3)
    assert convergence.say() is None and convergence.movement() == {}


def test_auto_says_that_few_batches_do_not_tell(caplog):
    convergence = Convergence(stops=True)
    assert convergence.say() is None, "of data that call the model by themselves nothing is known"
    convergence.note(ranges(a=1), 3, 6)
    assert convergence.say() == 'num_calibration_samples="auto": 6 samples do not tell whether it is enough: use more'
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_calibration_found_is_there_for_the_user():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FP8StateError, match="not calibrated"):
        range_movement(model)
    images = [torch.full((1, 4), float(n)) for n in range(1, 33)]
    prepare(model, FP8Config(dataset=images))
    assert range_movement(model) == {}
    calibrate(model)
    convert(model)
    assert range_movement(model) == {"0/input": pytest.approx(8 / 32)}


@pytest.mark.slow
def test_auto_stops_early_and_costs_no_accuracy():
    """On short lines, of which there are many: a part of them gives the loss that all of them give."""
    lines = [line for line in (TINY_LM / "calibration.txt").read_text().splitlines() if line.strip()][:1000]
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    ids = tokenizer((TINY_LM / "heldout.txt").read_text()[:12000], return_tensors="pt", verbose=False).input_ids
    ids = ids[0, : ids.shape[1] // 256 * 256].view(-1, 256)
    losses, samples = {}, {}
    for taken, batch_size in (("auto", 1), (len(lines), 8)):
        model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32)
        config = FP8Config(
            dataset=lines,
            num_calibration_samples=taken,
            batch_size=batch_size,
            tokenizer=tokenizer,
            scale_method="maxabs_arbitrary",
        )
        samples[taken] = calibrate(prepare(model, config))._optimum_fp8_state.measurements.samples
        with torch.no_grad():
            losses[taken] = float(convert(model)(input_ids=ids, labels=ids).loss)
    assert 32 <= samples["auto"] < len(lines) / 2
    assert losses["auto"] == pytest.approx(losses[len(lines)], abs=0.003), "the loss is about 3.2"
