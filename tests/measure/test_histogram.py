"""Observers that choose a range by a histogram: what they choose, against searches over the values themselves."""

from functools import partial

import pytest
import torch

from optimum_fp8 import Measurements
from optimum_fp8.formats import number_format
from optimum_fp8.measure import Context, Purpose, observed_by, observer_class
from optimum_fp8.scales import activation_scale

NAMES = ("percentile", "mse", "entropy")


def purpose_of(method="maxabs_arbitrary", target="cpu", fp8_config="E4M3"):
    options = {"method": method, "target": target, "fp8_config": fp8_config, "hp_dtype": "fp32"}
    return Purpose(number_format(fp8_config, target), partial(activation_scale, **options))


def seen(name, *tensors, per_head=False, **context):
    observer = observer_class(name).made_for(Context("fc", "input", **context))
    for x in tensors:
        observer.update_per_head(x) if per_head else observer.update(x)
    return observer


def squared_error(x, scale, fmt):
    codes = (x / scale).clamp(-fmt.full_scale, fmt.full_scale).to(fmt.dtype)
    return (codes.float() * scale - x).double().square().mean().item()


def with_outliers(count=100_000, size=1e4, share=1e-4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    x[: int(count * share)] = size * (1 + torch.rand(int(count * share), generator=generator))
    return x


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_and_the_count_are_exact(name, dtype):
    x = torch.randn(300, 7).to(dtype)
    observer = seen(name, x[:100], x[100:])
    statistics = observer.statistics()
    assert observer.largest() == x.abs().max().float() and statistics["count"] == x.numel()
    assert statistics["counts"].sum() == x.numel() and statistics["counts"].shape == (4096,)
    other = seen(name, x[200:])
    merged = seen(name, x[:200])
    merged.merge(other)
    assert all(torch.equal(merged.statistics()[key], value) for key, value in statistics.items())


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_percentile_of_numpy_to_within_a_bin(percentile, dtype):
    x = (torch.randn(50_000) * 3).to(dtype)
    found = seen("percentile", x, percentile=percentile).range().item()
    expected = torch.quantile(x.abs().float(), percentile / 100, interpolation="higher").item()
    assert expected <= found <= expected * (1 + 1 / 16) + 1e-30
    assert found <= x.abs().max()
    assert (x.abs().float() <= found).float().mean() >= percentile / 100


def test_a_percentile_that_only_zeros_reach_cuts_nothing_off():
    x = torch.zeros(10_000)
    x[0] = 3.3
    assert seen("percentile", x, percentile=90.0).range() == torch.tensor(3.3)


@pytest.mark.parametrize("target", ["cpu", "gaudi2"])
@pytest.mark.parametrize("method", ["maxabs_arbitrary", "maxabs_pow2", "maxabs_hw"])
@pytest.mark.parametrize("fp8_config", ["E4M3", "E5M2"])
def test_mse_is_as_good_as_a_search_over_the_values(target, method, fp8_config):
    purpose = purpose_of(method, target, fp8_config)
    torch.manual_seed(0)
    many = {"count": 20_000, "share": 0.1}
    for x in (with_outliers(**many), with_outliers(**many, size=40.0), torch.randn(20_000).relu(), torch.rand(20_000)):
        observer = seen("mse", x)
        chosen = purpose.scale_of(observer.range_for(purpose).reshape(1))
        candidates = purpose.scale_of(x.abs().max() * torch.exp2(-torch.arange(0, 14, 0.05)))
        best = min(squared_error(x, scale, purpose.fmt) for scale in candidates.unique())
        assert squared_error(x, chosen, purpose.fmt) <= best * 1.1
        assert observer.range_for(purpose) <= observer.largest()


@pytest.mark.parametrize("name", ["mse", "entropy"])
def test_the_range_depends_on_what_it_is_for(name):
    observer = seen(name, torch.cat([torch.randn(10_000) * 20, torch.tensor([90.0])]))
    coarse, fine = (observer.range_for(purpose_of("maxabs_hw", target)).item() for target in ("gaudi2", "cpu"))
    assert observer.range() == observer.largest() == 90, "without a purpose"
    assert fine != coarse <= 60, "Gaudi2's next scale above 1 is 16, which a range of 90 leads to"


@pytest.mark.core
@pytest.mark.parametrize("name", ["percentile", "entropy"])
def test_rare_outliers_do_not_set_the_range(name):
    x = with_outliers(share=3e-5)
    assert x.abs().max() > 1e4 and seen(name, x).range_for(purpose_of()) < 10


def test_mse_leaves_outliers_no_more_headroom_than_they_need():
    """They would cost more by saturating than all others by underflow, but the headroom of the backoff costs too."""
    x, purpose = with_outliers(), purpose_of("maxabs_pow2")
    scale = purpose.scale_of(seen("mse", x).range_for(purpose).reshape(1))
    by_maxabs = purpose.scale_of(x.abs().max().reshape(1))
    assert scale <= by_maxabs / 2 and x.abs().max() <= scale * 448 * 1.1


def test_entropy_keeps_the_distribution():
    """Of the values that are no outliers, next to none become 0, and next to none saturate."""
    x, purpose = with_outliers(share=3e-5), purpose_of("maxabs_hw", "gaudi2")
    scale = purpose.scale_of(seen("entropy", x).range_for(purpose).reshape(1))
    ordinary = x[3:].abs()
    assert (ordinary < scale * 2.0**-10).float().mean() < 0.01 and (ordinary > 240 * scale).float().mean() < 0.001
    assert seen("maxabs", x).range() / 60 > 16 * scale, "where maxabs would need a scale so much larger"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(name, value):
    x = torch.randn(100_000)
    x[77] = value
    assert not seen(name, x).range_for(purpose_of()).isfinite()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [torch.zeros(10), torch.full((10,), 0.7), torch.tensor([1e-42]), torch.tensor([3e38])])
def test_little_to_choose_from(name, x):
    assert seen(name, x).range_for(purpose_of()) == x.abs().max() or name != "percentile"
    scale = purpose_of().scale_of(seen(name, x).range_for(purpose_of()).reshape(1))
    assert bool(scale.isfinite()) and (scale * 448 >= x.abs().max() * 0.99).all()


@pytest.mark.parametrize("name", NAMES)
def test_ranges_per_head_are_the_largest_of_each(name):
    x = torch.randn(500, 3, 4).bfloat16()
    observer = seen(name, x, per_head=True)
    assert torch.equal(observer.range_per_head(), x.abs().amax((0, 2)).float())
    assert observer.statistics()["counts"].sum() == x.numel() and observer.largest() == x.abs().max()


@pytest.mark.core
@pytest.mark.parametrize("written_by", NAMES)
@pytest.mark.parametrize("read_by", (*NAMES, "maxabs"))
def test_each_reads_what_another_has_measured(written_by, read_by, tmp_path):
    x, measurements = with_outliers(), Measurements("f" * 32, observer=written_by, samples=3)
    for module in ("a", "b"):
        measurements.observe(module, "input", x)
        measurements.observe(module, "weight", x[:64].reshape(8, 8))
    measurements.save(tmp_path / "m")
    again = observed_by(Measurements.load(tmp_path / "m"), read_by, Context(percentile=99.0))
    expected, purpose = seen(read_by, x, percentile=99.0).range_for(purpose_of()), purpose_of()
    assert again.range("a", "input", purpose) == expected == again.at("b").of("input", purpose)
    assert again.at("a").largest("input") == x.abs().max() and again.range("a", "weight") == x[:64].abs().max()
    assert (again.samples, again.observer, again.fingerprint) == (3, read_by, "f" * 32)
    again.observe("a", "input", x * 2)
    assert again.at("a").largest("input") == 2 * x.abs().max()
    assert measurements.at("a").largest("input") == x.abs().max(), "what was read is left as it was"
