"""The keys that a checkpoint in FP8 may change are those of scales; which modules are in FP8 is none of them."""

from fresh import cold

from optimum_fp8.config.requantizing import OF_MEASURING, OF_SCALES


def test_keys_of_scales_and_of_measuring_are_apart():
    assert {"scale_method", "fp8_config", "activation_scheme", "hp_dtype", "target"} <= set(OF_SCALES)
    assert {"dataset", "num_calibration_samples", "observer", "percentile"} <= set(OF_MEASURING)
    assert not {"attention", "kv_cache", "quantize_lm_head", "blocklist", "dump_stats_path"} & {
        *OF_SCALES,
        *OF_MEASURING,
    }
    assert not set(OF_SCALES) & set(OF_MEASURING)


def test_the_list_is_read_without_torch():
    script = "import sys, optimum_fp8.config.requantizing; print('torch' in sys.modules)"
    assert cold(script) in ("False\n", cold("import sys, optimum_fp8; print('torch' in sys.modules)"))
