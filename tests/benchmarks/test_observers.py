"""Observers on a language model with planted outliers: each gains where it is said to, and loses nothing elsewhere."""

import pytest

from benchmarks import observers

pytestmark = pytest.mark.slow  # three models, measured once and quantized in four ways each


@pytest.fixture(scope="module")
def texts():
    return observers.Texts(6)


@pytest.fixture(scope="module")
def found(texts):
    """What each observer gives, by kind and factor of the outliers."""
    cases = (("none", 1), ("channel", 3000), ("spikes", 3000))
    return {case: dict(observers.of_observers(*case, texts)) for case in cases}


@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
@pytest.mark.parametrize("case, gain", [(("channel", 3000), 1.4), (("spikes", 3000), 3.0)])
def test_outliers_cost_maxabs_more(found, case, gain, observer):
    ours, maxabs = found[case][observer], found[case]["maxabs"]
    assert ours.divergence * gain < maxabs.divergence
    if case[0] == "spikes":
        assert ours.perplexity < maxabs.perplexity - 0.3


def test_without_outliers_all_are_as_good(found):
    plain = found["none", 1]
    for observer in observers.OBSERVERS:
        assert plain[observer].divergence < 1.15 * plain["maxabs"].divergence < 0.01
        assert plain[observer].perplexity == pytest.approx(plain["bfloat16"].perplexity, rel=0.01)


def test_planting_changes_nothing_of_what_the_model_computes(found):
    before = found["none", 1]["bfloat16"].perplexity
    for each in found.values():
        assert each["bfloat16"].perplexity == pytest.approx(before, rel=2e-3)


def test_ranges_measured_on_either_weights_give_as_good_a_model(texts, monkeypatch):
    monkeypatch.setattr(observers, "METHODS", ("maxabs_arbitrary",))
    (_, _, in_fp8), (_, _, in_high) = observers.of_weights(texts)
    assert in_fp8.divergence == pytest.approx(in_high.divergence, rel=0.15)
    assert in_fp8.perplexity == pytest.approx(in_high.perplexity, rel=5e-3)
