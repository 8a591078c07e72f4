"""The observer interface: a class written elsewhere is observed, stored, merged and read by what it declares."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_fp8 import Measurements
from optimum_fp8.errors import FP8ConfigError, FP8MeasurementError
from optimum_fp8.measure import OBSERVERS, Observer, Statistic, observer_class, register_observer


@pytest.fixture
def percentile(monkeypatch):
    """An observer of one's own: the value that all but a thousandth stay below, by a histogram with fixed bins."""
    monkeypatch.setattr("optimum_fp8.measure.observer.OBSERVERS", dict(OBSERVERS))

    @register_observer
    class Percentile(Observer):
        name = "thousandth"
        STATISTICS = {"counts": Statistic(torch.add, shape=(2048,)), "peaks": Statistic(torch.maximum, per_head=True)}

        def update(self, x):
            self.accumulate(counts=self.histogram(x))

        def update_per_head(self, x):
            self.accumulate(counts=self.histogram(x), peaks=x.abs().amax((0, 2)).float())

        def range(self):
            counts = self.statistics()["counts"]
            bins = (counts.cumsum(0) >= 0.999 * counts.sum()).nonzero()[:1]
            last = counts.nonzero()[-1:]  # Inf and NaN have the largest exponent: they are never cut off
            return (torch.where(last >= 2040, last, bins).to(torch.int16) << 4).view(torch.bfloat16).float().reshape(())

        def range_per_head(self):
            return self.statistics().get("peaks")

        @staticmethod
        def histogram(x):  # over the eleven upper bits of the magnitude in bfloat16
            bins = (x.bfloat16().view(torch.int16).int() & 0x7FFF) >> 4
            return torch.bincount(bins.flatten(), minlength=2048)

    return Percentile


def measured(*tensors, **options):
    measurements = Measurements("f", observer="thousandth", **options)
    for x in tensors:
        measurements.observe("fc", "input", x)
    return measurements


X = torch.cat([torch.full((5000,), 2.0), torch.tensor([1000.0])])


@pytest.mark.core
def test_an_observer_of_ones_own_goes_the_whole_way(percentile, tmp_path):
    one, two = measured(X, samples=1), measured(X * 2, samples=1)
    assert one.range("fc") == 2.0
    one.save(tmp_path / "one")
    merged = Measurements.load(tmp_path / "one").merged(two)
    merged.save(tmp_path / "both")
    again = Measurements.load(tmp_path / "both")
    assert again.observer == "thousandth" and type(again.tensors["fc", "input"]) is percentile
    assert again.range("fc") == 4.0 and again.samples == 2
    assert torch.equal(again.tensors["fc", "input"].statistics()["counts"], percentile.histogram(torch.cat([X, 2 * X])))
    assert one.range("fc") == 2.0 and two.range("fc") == 4.0, "merging changes neither side"


def test_its_statistics_per_head(percentile, tmp_path):
    measurements = measured()
    measurements.observe("attn", "k", torch.arange(12.0).view(2, 3, 2), per_head=True)
    measurements.save(tmp_path / "heads")
    again = Measurements.load(tmp_path / "heads")
    assert again.range_per_head("attn", "k").tolist() == [7.0, 9.0, 11.0]
    again.observe("attn", "k", torch.ones(4))
    assert again.range_per_head("attn", "k") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_for_any_observer(percentile, value):
    with pytest.raises(FP8MeasurementError, match="fc: the measured input holds NaN or Inf"):
        measured(X, torch.tensor([value])).range("fc")


def test_observers_that_keep_nothing_per_head_see_any_tensor(percentile):
    class Whole(percentile):
        name, update_per_head, range_per_head = "whole", Observer.update_per_head, Observer.range_per_head

    observer = Whole()
    observer.update_per_head(torch.ones(4, 2, 3))
    assert observer.range() == 1.0 and observer.range_per_head() is None


def test_measurements_of_different_observers_cannot_be_merged(percentile):
    with pytest.raises(FP8MeasurementError, match="'thousandth' and 'maxabs'; measure both with one"):
        measured(X).merged(Measurements("f"))
    with pytest.raises(FP8MeasurementError, match="'thousandth' and 'maxabs' cannot be merged"):
        measured(X).add("fc", "input", observer_class("maxabs")(maxabs=torch.tensor(1.0), count=torch.tensor(1)))


def test_a_file_of_an_observer_that_is_not_known_here(percentile, tmp_path, monkeypatch):
    measured(X).save(tmp_path / "measure")
    monkeypatch.undo()
    with pytest.raises(FP8MeasurementError, match=r"measure_.*observer='thousandth' is not known.*valid: maxabs"):
        Measurements.load(tmp_path / "measure")


@pytest.mark.parametrize(
    "statistics, message",
    [
        ({"counts": torch.zeros(2047)}, r"'counts' has shape \(2047,\), expected \(2048,\)"),
        ({"peaks": torch.zeros(2)}, r"found statistics \['peaks'\], expected \['counts'\]"),
        ({"counts": torch.zeros(2048), "sum": torch.zeros(())}, r"\['counts', 'sum'\], expected \['counts'\]"),
        ({"counts": torch.zeros(2048), "peaks": torch.zeros(())}, r"'peaks' has shape \(\), expected \(heads, \)"),
    ],
    ids=["shape", "missing", "undeclared", "not per head"],
)
def test_statistics_that_were_not_declared(percentile, statistics, message, tmp_path):
    with pytest.raises(FP8MeasurementError, match=message):
        percentile().accumulate(**statistics)
    path = measured(X).save(tmp_path / "measure")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["measurements"])
    del header["checksum"]
    tensors = {f"fc/input/{key}": value for key, value in statistics.items()}
    save_file(tensors, path, metadata={"measurements": json.dumps(header)})
    with pytest.raises(FP8MeasurementError, match=rf"damaged \(fc/input: .*{message}.*measure again"):
        Measurements.load(tmp_path / "measure")


def test_a_name_that_is_taken(percentile):
    class Other(percentile):
        pass

    with pytest.raises(FP8ConfigError, match=r"observer 'thousandth' is .*Percentile already: name .*Other otherwise"):
        register_observer(Other)
    assert register_observer(percentile) is observer_class("thousandth") is percentile


def test_a_name_that_is_not_known():
    with pytest.raises(FP8ConfigError, match="observer='maxab' is not known: did you mean 'maxabs'"):
        observer_class("maxab")


def test_every_observer_of_the_package_is_found_by_its_name():
    assert OBSERVERS and all(cls.name == name and cls.STATISTICS for name, cls in OBSERVERS.items())
