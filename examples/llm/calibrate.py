"""Measure a causal language model on a text, in one process or many, then write its FP8 checkpoint.

python examples/llm/calibrate.py                                                    # one process, the embedded model
torchrun --nproc_per_node 2 examples/llm/calibrate.py                               # two, on CPUs or GPUs
accelerate launch --config_file examples/llm/accelerate/multi_gpu.yaml examples/llm/calibrate.py --model … --dataset …
torchrun --nproc_per_node 8 examples/llm/calibrate.py --fsdp --model …              # an eighth of the weights in each

The measurements and the checkpoint are the same bytes for any number of processes. Broken off, it goes on when it is
started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import is_hpu_available
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_fp8 import FP8Config, calibrate, finalize_calibration, prepare

TINY_LM = Path(__file__).parent / "tiny_lm"


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights spread over the processes by FSDP2, layer by layer."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=len):
        fully_shard(layer)
    fully_shard(model)
    return model


def measure(options: argparse.Namespace, config: FP8Config, state: PartialState) -> None:
    """Run the text through the model, and write the measurements to `dump_stats_path`; in all processes at once."""
    if not options.fsdp:
        AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=config, device_map={"": state.device}, dtype=options.dtype
        )
        return
    model = prepare(sharded(AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)), config)
    calibrate(model)
    finalize_calibration(model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--dataset", default=str(TINY_LM / "calibration.txt"))
    parser.add_argument("--samples", default=64, type=int)
    parser.add_argument("--length", default=512, type=int, help="tokens of a sample at most")
    parser.add_argument("--batch-size", default=1, type=int)
    parser.add_argument("--scale-method", default="maxabs_hw")
    parser.add_argument("--ranges", default="fp8/ranges", help="where measurements go: a folder and a file's beginning")
    parser.add_argument("--output", default="fp8/checkpoint")
    parser.add_argument("--progress-log", help="a file for the progress, one JSON object a line")
    parser.add_argument("--fsdp", action="store_true", help="spread the weights over the processes (FSDP2)")
    options = parser.parse_args(arguments)

    state = PartialState(cpu=not (is_hpu_available() or torch.accelerator.is_available()))
    if options.fsdp and not torch.distributed.is_initialized():
        raise SystemExit("--fsdp spreads weights over processes: start it with torchrun or accelerate launch")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = FP8Config(
        mode="MEASURE",
        dataset=options.dataset,
        tokenizer=tokenizer,
        num_calibration_samples=options.samples,
        max_seq_length=options.length,
        batch_size=options.batch_size,
        scale_method=options.scale_method,
        dump_stats_path=options.ranges,
        calibration_log=options.progress_log,
    )
    measure(options, config, state)

    if state.is_main_process:
        quantize = config.replace(mode="QUANTIZE", dataset=None, tokenizer=None)
        model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=quantize, dtype=options.dtype)
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        print(f"measurements: {options.ranges}_measurements.safetensors, checkpoint: {options.output}")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
