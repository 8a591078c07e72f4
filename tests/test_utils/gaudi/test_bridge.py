"""The stand-in for `habana_frameworks`: its start-up functions, and which tensors they make constant."""

import importlib

import pytest
import torch
from torch import nn

from optimum_fp8.test_utils import gaudi


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("scale_input", torch.tensor([0.0625]))
        self.register_buffer("hidden_scale", torch.tensor([1.0]), persistent=False)
        self.register_buffer("s", torch.tensor([1.0]))


def core():
    return importlib.import_module("habana_frameworks.torch.core")


def hpu():
    return importlib.import_module("habana_frameworks.torch.hpu")


INITIALIZE = ["hpu_initialize", "hpu_inference_initialize"]
SET_ENV = ["hpu_set_env", "hpu_set_inference_env", "hpu_inference_set_env"]


@pytest.mark.core
@pytest.mark.parametrize("name", INITIALIZE)
def test_scales_become_constant_by_their_keys_in_the_state_dict(gaudi2, name):
    getattr(core(), name)(Quantized(), mark_only_scales_as_const=True)
    assert list(gaudi2.constants) == ["scale_input"] and gaudi2.events == [name]


def test_all_parameters_become_constant(gaudi2):
    core().hpu_initialize(Quantized())
    assert list(gaudi2.constants) == ["weight", "scale_input", "s"]
    gaudi2.constants.clear()
    core().hpu_inference_initialize(Quantized(), mark_scales=False)
    assert list(gaudi2.constants) == ["weight", "s"]


def test_nothing_becomes_constant_in_eager_mode():
    with gaudi.emulated("gaudi2", lazy=False) as device:
        core().hpu_initialize(Quantized(), mark_only_scales_as_const=True)
        assert device.constants == {} and device.events == ["hpu_initialize"]


def test_names_of_the_generation_before():
    """Names and arguments that came with the newer one are not there."""
    with gaudi.emulated("gaudi2", bridge="1.19") as device:
        assert not hasattr(core(), "hpu_inference_set_env") and not hasattr(core(), "hpu_inference_reset_env")
        with pytest.raises(TypeError, match="mark_scales"):
            core().hpu_inference_initialize(Quantized(), mark_scales=True)
        core().hpu_inference_initialize(Quantized(), mark_only_scales_as_const=True)
    assert list(device.constants) == ["scale_input"]


@pytest.mark.parametrize("name", SET_ENV)
def test_batch_norms_are_fused_into_convolutions(gaudi2, name):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    model[1].running_mean.uniform_()
    x = torch.randn(1, 2, 6, 6)
    fused = getattr(core(), name)(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), model(x))
    assert getattr(core(), name)() is None and gaudi2.events == [name, name]


def test_events_keep_their_order(gaudi2):
    core().hpu_set_env()
    model = hpu().wrap_in_hpu_graph(Quantized())
    core().hpu_initialize(model, mark_only_scales_as_const=True)
    core().mark_step()
    core().hpu_teardown_inference_env()
    core().hpu_reset_env()
    core().hpu_inference_reset_env()
    expected = ["hpu_set_env", "wrap_in_hpu_graph", "hpu_initialize", "mark_step"]
    assert gaudi2.events == [*expected, "hpu_teardown_inference_env", "hpu_reset_env", "hpu_inference_reset_env"]


def test_the_device_says_what_it_is(device):
    assert hpu().is_available() and hpu().device_count() == 1 and hpu().current_device() == 0
    assert hpu().get_device_name() == device.chip.name
    hpu().synchronize()
    hpu().enable_inference_mode()
    hpu().disable_inference_mode()
    assert device.events == ["enable_inference_mode", "disable_inference_mode"]


def test_modules_are_imported_in_all_ways(gaudi2):
    import habana_frameworks.torch.core as htcore
    import habana_frameworks.torch.hpu as ht
    from habana_frameworks.torch.hpex.kernels import FusedSDPA, fp8_fused_sdpa
    from habana_frameworks.torch.hpu import wrap_in_hpu_graph

    assert htcore is core() and ht is hpu() and callable(fp8_fused_sdpa) and callable(FusedSDPA.apply)
    assert wrap_in_hpu_graph(nn.Identity()).training
    with pytest.raises(ImportError):
        importlib.import_module("habana_frameworks.mediapipe")
