"""FP8Quantizer: `from_pretrained(…, quantization_config=FP8Config(…))` walks the whole flow in one call.

Weights become FP8 while they are loaded, one at a time. Then, as the configuration says, activations are calibrated,
or scaled by stored measurements, or dynamically, or the model is returned in measuring state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer

from ..attention import choices_by_config, chosen_before_loading
from ..calibration import calibrate, calibrate_sequentially, check_dataset, check_sequential, facts_of
from ..checkpoint.foreign import source_of
from ..checkpoint.intact import check_saved, recorded
from ..checkpoint.names import ScaleBesideWeight
from ..checkpoint.native import check_complete, check_scales, saved_decisions, scales_among
from ..checkpoint.provenance import recorded_provenance, told_of
from ..checkpoint.ranges import converted_targets, recorded_ranges
from ..checkpoint.targets import fit_to_target
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError, FP8ScaleError
from ..formats import is_fp8
from ..lifecycle import (
    MEASURED_BEFORE,
    FP8State,
    Origin,
    Phase,
    convert_with,
    dequantize,
    empty_measurements,
    expect_folded,
    finalize_calibration,
    fold_batch_norms,
    found_measurements,
    needs_ranges,
    prepare,
    select_folded,
    set_state,
    start_observing,
    state_of,
    stored_measurements,
)
from ..measure import architecture, check_dump_path, model_fingerprint, processes
from ..modules import fp8_modules
from ..modules.handler import Change, converted_modules, pack_all
from ..selection import Decision
from .backends import set_up_devices
from .conversions import (
    CheckCodes,
    Loading,
    QuantizeWeight,
    ScaleRenaming,
    becomes_fp8,
    freeze,
    keys_of_codes,
    observe_weight,
    without_fp8,
)
from .foreign import check_files, foreign_conversions, keeps_dtype, shapes_in
from .load_overrides import apply_load_overrides, check_module_overrides, settle_target
from .loading_call import (
    given_state_dict,
    loading_origin,
    reads_data,
    refuse_distributed_loading,
    refuse_experts_on_disk,
    refuse_weights_on_disk,
    refuse_zero3,
)
from .parallel_plan import check_plan, keep_own_part, keep_whole
from .parts import adopt_parts, attach_to_parts
from .room import make_room
from .saving import config_to_save, mark_as_quantized, tensors_to_save
from .seal import sealed_metadata
from .sequential import OntoDisk, without_disk
from .source import refuse_codes
from .ties import tied_modules, untie
from .training_state import restore_training_state, training_state

logger = logging.getLogger(__name__)


class FP8Quantizer(HfQuantizer):
    """transformers' hooks, in the order they are called; each hands over to the step it belongs to."""

    requires_calibration = False

    def __init__(self, quantization_config: FP8Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: FP8Config = quantization_config
        self._decisions: list[Decision] = []
        self._chosen: dict[str, str] = {}
        self._untied: list[Change] = []
        self._measured = empty_measurements(quantization_config)
        self._loading = Loading(partial(observe_weight, self._measured, quantization_config))
        self._origin: Origin | None = None
        self._batches: Iterator[Any] | None = None
        self._onto_disk: OntoDisk | None = None
        self._told: dict[str, Any] = {}  # what the record says of a part of a converted model, without state of its own
        quantization_config.post_init()  # keys may have been assigned since it was made
        if quantization_config.dataset is not None:
            check_dataset(quantization_config.dataset)
        if self.pre_quantized:
            self._made_for = apply_load_overrides(quantization_config)
        elif quantization_config.mode == "LOAD" or quantization_config.dequantize:
            key = "dequantize=True" if quantization_config.dequantize else "mode='LOAD'"
            raise FP8ConfigError(f"{key} is for FP8 checkpoints, and this checkpoint is not one: use mode='AUTO'")
        elif quantization_config.calibration == "sequential":
            check_sequential(quantization_config)
            self._onto_disk = OntoDisk(quantization_config)
            self._loading.keep = self._onto_disk.memory.keep

    # --- before loading -------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called twice: with the `device_map` as given, and with it resolved, if that was to be done."""
        device_map = kwargs.get("device_map")
        refuse_zero3()
        refuse_experts_on_disk(self._decisions, device_map)
        set_up_devices(device_map)
        if self._onto_disk is not None:
            if isinstance(device_map, dict) and "weights_only" not in kwargs:
                device_map.update(without_disk(device_map))
        else:
            refuse_weights_on_disk(device_map, self.pre_quantized, self.quantization_config.dequantize)

    def update_device_map(self, device_map: Any) -> Any:
        if self._onto_disk is not None and isinstance(device_map, dict):
            return without_disk(device_map)
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise FP8ConfigError(f"dtype={dtype} cannot go with FP8Config: expected bfloat16, float16 or float32")
        if self._onto_disk is not None:
            self._onto_disk.dtype = dtype
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        self._chosen = chosen_before_loading(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config, files = self.quantization_config, checkpoint_files
        if not self.pre_quantized:
            refuse_codes(model, files)
        if config.leaves_weights:
            self._trained = training_state(model, files) if config.fake_quant else {}
            return
        implementations, folded, shapes = choices_by_config(model, self._chosen), set[str](), {}
        if self.pre_quantized:
            adopt_parts(model, config)
            settle_target(config, self._made_for)
            told = recorded(files)
            shapes = shapes_in(model, config, files)
            expect_folded(model, config, shapes)
            self._decisions = saved_decisions(model, config, files, implementations, told.get("modules"), shapes)
            self._measured.tensors = recorded_ranges(told, self._decisions, f"{model.base_model_prefix}.")
            check_module_overrides(model, config, self._decisions)
            self._told = {"provenance": recorded_provenance(told, self._made_for, config.resolved_target)}
            self._untied = untie(model, [each.name for each in self._decisions if each.selected])
        else:
            self._decisions, folded = select_folded(model, config, implementations)
        scales = scales_among(shapes) if self.pre_quantized else None
        make_room(model, self._decisions, self._measured, scales, tied_modules(model) | folded)
        check_plan(model, self.pre_quantized and not config.dequantize)
        refuse_experts_on_disk(self._decisions, kwargs.get("device_map"))
        if self.pre_quantized:
            check_files(model, self._decisions, config, self._made_for, files)
            if reads_data(kwargs.get("device_map")):
                check_saved(files, model=model)
        if self._onto_disk is not None:
            self._onto_disk.look_at(model, files)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        keep_whole(model, plan)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The last hook before weights are read, and the first outside of the context that builds on meta."""
        if not self.pre_quantized:
            self._look_first(model)
            return weight_conversions
        renamings: list[Any] = []
        kept = [name for name, (_, handler) in converted_modules(model).items() if not handler.family.replaced]
        if kept and self.quantization_config.format_version < 2:
            renamings = [ScaleRenaming(kept)]
        check = WeightConverter(r"\.weight$", ".weight", [CheckCodes(self._loading)])
        known = without_fp8(weight_conversions, keys_of_codes(model))
        if (source := source_of(self.quantization_config)) is not None:
            return foreign_conversions(model, source, known, self._loading)
        return [*renamings, *known, ScaleBesideWeight(), check]

    def _look_first(self, model: Any) -> None:
        """Find what is wrong with paths and data before the weights are read, which takes long."""
        config = self.quantization_config
        self._origin = loading_origin(model)
        measures = config.mode == "MEASURE"
        if measures:
            check_dump_path(config.dump_stats_path)
        elif not any(each.selected and each.scheme.needs_ranges for each in self._decisions):
            return
        stored = None
        if config.dataset is None and not measures:
            stored = found_measurements(config, required=config.mode == "QUANTIZE")
        if measures or config.dataset is not None or (stored is None and config.scheme != "auto"):
            refuse_distributed_loading()
            processes()
        if config.dataset is not None:
            self._batches = check_dataset(config.dataset).opened(config.dataset, config, facts_of(model, self._origin))
        if self._onto_disk is not None:
            self._onto_disk.look_first(model, self._decisions, self._batches)

    # --- while loading --------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        name, _, parameter = param_name.rpartition(".")
        if becomes_fp8(model.get_submodule(name), parameter):
            return True
        # Asked again of what has been loaded, it is about shapes: those of all others are transformers' to check.
        loads = self._loading.missing_keys is None
        return loads and self._onto_disk is not None and self._onto_disk.takes(model, param_name)

    @property
    def quantized_element_size(self) -> float:
        return 1

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Nothing is cast to FP8 while loading: codes are taken as they are, and anything else is refused."""
        return None if keeps_dtype(converter) or (dtype is not None and is_fp8(dtype)) else dtype

    def get_quantize_ops(self) -> QuantizeWeight:
        return QuantizeWeight(self._loading)

    # --- after loading --------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._raise_failures()
        advice = "modules that are new to the model go into modules_to_not_convert"
        if self.pre_quantized:
            advice = "quantize the original model, loaded with this class"
        check_complete(model, self._loading.missing_keys, advice)
        freeze(model)
        if self.pre_quantized:
            self._finish_checkpoint(model)
        elif self.quantization_config.leaves_weights:
            self._prepare_only(model)
        else:
            self._finish_on_the_fly(model)
        return model

    def _finish_checkpoint(self, model: Any) -> None:
        config = self.quantization_config
        check_scales(model, "loaded")
        state = FP8State(config, self._decisions, Phase.CONVERTED, self._measured, changes=self._untied)
        state.provenance = self._told.pop("provenance")
        set_state(model, state)
        if config.dequantize:
            self._dequantize(model)
            # transformers would take our own conversions back when it saves the model; so it looks up its own.
            model.__dict__.pop("_weight_conversions", None)
            return
        fit_to_target(converted_targets(model, state), self._made_for)
        targets = state.targets(model)
        for target in targets:
            target.handler.loaded(target)
        keep_own_part(model)
        state.change_around(model, targets)
        pack_all(model)
        self._mark(model)

    def _prepare_only(self, model: Any) -> None:
        """The model stays in high precision, to be measured or trained."""
        config = self.quantization_config
        self.remove_quantization_config(model)
        prepare(model, config)
        restore_training_state(model, self._trained)
        state = state_of(model)
        assert state is not None
        state.origin = self._origin
        if config.dataset is not None:
            calibrate(model, batches=self._taken_batches())
            finalize_calibration(model)

    def _finish_on_the_fly(self, model: Any) -> None:
        config, folds = self.quantization_config, fold_batch_norms(model, self.quantization_config)
        self._measured.fingerprint = model_fingerprint(model, self._loading.digests)
        self._measured.architecture = architecture(model)
        state = FP8State(config, self._decisions, Phase.MEASURING, self._measured, changes=folds)
        state.origin, state.digests = self._origin, self._loading.digests
        set_state(model, state)
        if needs_ranges(state) and not self._find_ranges(model, state):
            logger.warning(
                "static activations need ranges and there are none yet: the model is in measuring state. Run your "
                "data through it, then call optimum_fp8.convert(model)"
            )
            return
        loaded = fp8_modules(model)
        convert_with(model, state)
        if self._onto_disk is not None:
            self._onto_disk.finish(model, loaded)
        self._mark(model)

    def _mark(self, model: Any) -> None:
        state = state_of(model)
        assert state is not None
        self.quantization_config = config_to_save(model, state)
        mark_as_quantized(model, self.quantization_config, state)
        attach_to_parts(model, state, FP8Quantizer)

    def _find_ranges(self, model: Any, state: FP8State) -> bool:
        """Calibrate, or take stored measurements; False if the model has to be measured by hand.

        With neither, `activation_scheme="auto"` goes on without ranges, and the conversion makes them dynamic.
        """
        config = state.config
        if config.dataset is not None:
            batches = self._taken_batches()
            if self._onto_disk is not None and batches is not None:
                calibrate_sequentially(model, state, batches)
            else:
                start_observing(model, state)
                calibrate(model, batches=batches)
            return True
        stored = stored_measurements(config, model, state.measurements, required=config.mode == "QUANTIZE")
        if stored is not None:
            state.measurements, state.sources = stored, [MEASURED_BEFORE]
            return True
        if config.scheme == "auto":
            return True
        start_observing(model, state)
        return False

    def _taken_batches(self) -> Iterator[Any] | None:
        """The batches that were opened, which are not kept: models are copied with their quantizers."""
        batches, self._batches = self._batches, None
        return batches

    def _raise_failures(self) -> None:
        if self._loading.failures:
            listed = "; ".join(f"{name}: {error}" for name, error in sorted(self._loading.failures.items()))
            error = FP8CheckpointError if self.pre_quantized else FP8ScaleError
            raise error(f"{len(self._loading.failures)} weights cannot be used: {listed}")

    # --- afterwards -----------------------------------------------------------------------------------------------

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Without a dtype each weight gets its own; transformers would take that of the first, kept in float32 or not.
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        return dequantize(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Leave nothing on the model, or on the models in it, that says it was quantized."""
        super().remove_quantization_config(model)
        for config in (getattr(module, "config", None) for module in model.modules()):
            for name in ("quantization_config", "_is_quantized"):
                getattr(config, "__dict__", {}).pop(name, None)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if state_of(model) is not None:
            self._mark(model)  # what is written is what was done, whatever became of the model's config since
        tensors, told = tensors_to_save(model, given_state_dict(model)), self._told | told_of(model)
        return tensors, sealed_metadata(model, self.quantization_config, told, tensors)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    # Trainer takes a model, for evaluate and predict too, only if it says it is trainable both ways. What is not in FP8
    # is trained: norms, biases, adapters. A gradient that an FP8 operator does not have is refused by that operator.
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        refuse_zero3()
        return True

    @property
    def is_compileable(self) -> bool:
        return True
