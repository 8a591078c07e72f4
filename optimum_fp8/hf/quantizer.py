"""FP8Quantizer: `from_pretrained(…, quantization_config=FP8Config(…))` walks the whole flow in one call.

Weights become FP8 while they are loaded, one at a time. Then, as the configuration says, activations are calibrated,
or scaled by stored measurements, or dynamically, or the model is returned in measuring state.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer

from ..calibration import calibrate, check_file
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError, FP8ScaleError
from ..formats import is_fp8
from ..measure import Measurements, TensorStatistics, model_fingerprint, weight_digest
from ..modules import FP8Module, fp8_modules, fp8_skeleton, frozen, recipe_for, swap
from ..quantize import (
    convert_with,
    dequantize,
    finalize_calibration,
    needs_ranges,
    prepare,
    start_observing,
    stored_measurements,
)
from ..selection import Decision, candidates, select
from ..state import FP8State, set_state, state_of
from .attach import checkpoint_config, settle
from .checkpoint import check_complete, check_scales, fit_to_target, honour_request, saved_decisions, tensors_to_save
from .conversions import QuantizeWeight, SqueezeWeight, without_fp8
from .saved_attention import (
    chosen_implementations,
    declare_saved_attention,
    finish_saved_attention,
    fit_attention_to_target,
    select_loaded_attention,
)

logger = logging.getLogger(__name__)


class FP8Quantizer(HfQuantizer):
    """transformers' hooks, in the order they are called; each hands over to the step it belongs to."""

    requires_calibration = False

    def __init__(self, quantization_config: FP8Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: FP8Config = quantization_config
        self.failures: dict[str, str] = {}
        self.missing_keys: set[str] | None = None  # transformers' own set, once any weight has been loaded
        self._decisions: list[Decision] = []
        self._attention: list[Decision] = []
        self._chosen: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._weights: dict[str, TensorStatistics] = {}
        quantization_config.post_init()  # keys may have been assigned since it was made
        if isinstance(quantization_config.dataset, str):
            check_file(quantization_config.dataset)
        if self.pre_quantized:
            self._made_for = honour_request(quantization_config)
        elif quantization_config.mode == "LOAD" or quantization_config.dequantize:
            key = "dequantize=True" if quantization_config.dequantize else "mode='LOAD'"
            raise FP8ConfigError(f"{key} is for FP8 checkpoints, and this checkpoint is not one: use mode='AUTO'")

    # --- before loading -------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called twice: with the `device_map` as given, and with it resolved."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            if not self.pre_quantized:
                raise FP8NotAvailableError(
                    "device_map puts modules on disk, and weights quantized while loading cannot be offloaded there: "
                    "quantize and save the model once, then load the FP8 checkpoint with this device_map"
                )
            if self.quantization_config.dequantize:
                raise FP8NotAvailableError("dequantize=True cannot be combined with modules on disk: drop one of them")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise FP8ConfigError(f"dtype={dtype} cannot go with FP8Config: expected bfloat16, float16 or float32")
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        self._chosen = chosen_implementations(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if config.mode == "MEASURE":
            return
        if self.pre_quantized:
            self._decisions = saved_decisions(model, config, checkpoint_files)
            self._attention = declare_saved_attention(model, config, checkpoint_files, self._chosen)
        else:
            self._decisions = select(model, config)
            self._attention = select_loaded_attention(model, config, self._chosen, self._decisions)
        tied = {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", {})}
        found, recipe = candidates(model), recipe_for(config, dynamic=config.scheme == "dynamic")
        skeletons: dict[nn.Module, nn.Module] = {}
        for decision in self._decisions:
            if not decision.selected or decision.name in tied:  # tied ones get their weight after loading
                continue
            skeleton = fp8_skeleton(found[decision.name], recipe, decision.name)
            skeleton.managed = True
            if not self.pre_quantized:
                # Checkpoint tensors may be cast to the dtype of the parameter they are for: not to FP8 before scaling.
                skeleton.weight = frozen(torch.empty(skeleton.weight.shape, device="meta"))
            elif config.scheme == "static":
                skeleton.input_scale = frozen(torch.full((1,), torch.nan, dtype=torch.float32, device="meta"))
            skeletons[found[decision.name]] = skeleton
        swap(model, skeletons)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        if not self.pre_quantized:
            return weight_conversions
        squeeze = WeightConverter("weight", "weight", [SqueezeWeight(self)])
        return [*without_fp8(weight_conversions, fp8_modules(model)), squeeze]

    # --- while loading --------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, parameter = param_name.rpartition(".")
        return not self.pre_quantized and parameter == "weight" and isinstance(model.get_submodule(name), FP8Module)

    @property
    def quantized_element_size(self) -> float:
        return 1

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Nothing is cast to FP8 while loading: codes are taken as they are, and anything else is refused."""
        return None if dtype is not None and is_fp8(dtype) else dtype

    def get_quantize_ops(self) -> QuantizeWeight:
        return QuantizeWeight(self)

    def observe_weight(self, name: str, weight: torch.Tensor, maxabs: torch.Tensor) -> None:
        """Remember what only the high-precision weight can tell: its part of the fingerprint, and its range."""
        self._digests[f"{name}.weight"] = weight_digest(weight)
        if "weight" in self.quantization_config.measured:
            count = torch.tensor(weight.numel(), dtype=torch.int64, device=weight.device)
            self._weights[name] = TensorStatistics(maxabs.amax(), count)

    # --- after loading --------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._raise_failures()
        check_complete(model, self.missing_keys)
        for module in fp8_modules(model).values():
            for parameter in (module.weight, module.weight_scale, module.input_scale):
                if parameter is not None:
                    parameter.requires_grad_(False)
        if self.pre_quantized:
            self._finish_checkpoint(model)
        elif self.quantization_config.mode == "MEASURE":
            self._measure_only(model)
        else:
            self._finish_on_the_fly(model)
        return model

    def _finish_checkpoint(self, model: Any) -> None:
        config = self.quantization_config
        check_scales(model, "loaded")
        if config.dequantize:
            self._dequantize(model, model.dtype)
            return
        fit_to_target(model, self._made_for)
        fit_attention_to_target(model, config, self._made_for)
        state = FP8State(config, self._decisions, "converted", Measurements(fingerprint=""), attention=self._attention)
        set_state(model, state)
        finish_saved_attention(model, state)
        self._settle(model)

    def _measure_only(self, model: Any) -> None:
        """mode MEASURE: the model stays in high precision, with observers on it."""
        config = self.quantization_config
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False
        prepare(model, config)
        if config.dataset is not None:
            calibrate(model)
            finalize_calibration(model)

    def _finish_on_the_fly(self, model: Any) -> None:
        config = self.quantization_config
        measurements = Measurements(model_fingerprint(model, self._digests))
        for name, statistics in self._weights.items():
            measurements.observe(name, "weight", statistics)
        state = FP8State(config, self._decisions, "measuring", measurements, attention=self._attention)
        set_state(model, state)
        if needs_ranges(config) and not self._find_ranges(model, state):
            logger.warning(
                "static activations need ranges and there are none yet: the model is in measuring state. Run your "
                "data through it, then call optimum_fp8.convert(model)"
            )
            return
        convert_with(model, state)
        self._settle(model)

    def _settle(self, model: Any) -> None:
        state = state_of(model)
        assert state is not None
        self.quantization_config = checkpoint_config(state)
        settle(model, self.quantization_config)

    def _find_ranges(self, model: Any, state: FP8State) -> bool:
        """Calibrate, or take stored measurements; False if the model has to be measured by hand.

        With neither, `activation_scheme="auto"` goes on without ranges, and the conversion makes them dynamic.
        """
        config = state.config
        if config.dataset is not None:
            start_observing(model, state)
            calibrate(model)
            return True
        stored = stored_measurements(config, state.measurements.fingerprint, required=config.mode == "QUANTIZE")
        if stored is not None:
            state.measurements = stored
            return True
        if config.scheme == "auto":
            return True
        start_observing(model, state)
        return False

    def _raise_failures(self) -> None:
        if self.failures:
            listed = "; ".join(f"{name}: {error}" for name, error in sorted(self.failures.items()))
            error = FP8CheckpointError if self.pre_quantized else FP8ScaleError
            raise error(f"{len(self.failures)} weights cannot be used: {listed}")

    # --- afterwards -----------------------------------------------------------------------------------------------

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Saving leaves the dtype in the model's config as a string, and transformers passes it on.
        restored_dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        return dequantize(model, restored_dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if state_of(model) is not None:
            self._settle(model)  # what is written is what was done, whatever became of the model's config since
        return tensors_to_save(model), {"optimum_fp8": json.dumps({"format_version": FP8Config().format_version})}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
