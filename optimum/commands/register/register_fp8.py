"""`optimum-cli fp8 …`. optimum-cli imports this file at every start, so everything heavy is imported in `run`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class FP8QuantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 quantize`: a checkpoint in, an FP8 checkpoint out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Quantize a model to FP8 and save it as a checkpoint that from_pretrained loads."
        parser.add_argument("--model", required=True, help="folder or hub name of the model")
        parser.add_argument("--output", required=True, help="folder to write the FP8 checkpoint to")
        parser.add_argument("--dataset", help="text (.txt, .md) or JSON-lines (.jsonl) file to calibrate with")
        parser.add_argument("--config", help="JSON file with an FP8Config, or one written for INC")
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
        parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        keys = parser.add_argument_group("keys of FP8Config (they win over --config)")
        keys.add_argument("--scale-method", help="maxabs_hw, maxabs_pow2, maxabs_arbitrary, unit_scale, …")
        keys.add_argument("--fp8-config", help="E4M3 or E5M2")
        keys.add_argument("--target", help="auto, gaudi2, gaudi3, cuda or cpu")
        keys.add_argument("--activation-scheme", help="auto, static, dynamic or weight_only")
        keys.add_argument("--num-calibration-samples", type=int)
        keys.add_argument("--max-seq-length", type=int)
        keys.add_argument("--batch-size", type=int)
        keys.add_argument("--text-column", help="key of the text in JSON lines")
        keys.add_argument("--modules-to-not-convert", nargs="+", metavar="NAME")
        keys.add_argument("--quantize-lm-head", action="store_true", default=None)
        keys.add_argument("--attention", action="store_true", default=None, help="products of attention in FP8")
        keys.add_argument("--kv-cache", action="store_true", default=None, help="keys and values cached in FP8")
        keys.add_argument("--attention-granularity", help="tensor or head")

    def run(self) -> None:
        from optimum_fp8.commands.quantize import main

        raise SystemExit(main(self.args))


class FP8Command(BaseOptimumCLICommand):
    """`optimum-cli fp8`."""

    COMMAND = CommandInfo(name="fp8", help="FP8 quantization of Hugging Face models.")
    SUBCOMMANDS = (
        CommandInfo(name="quantize", help="Quantize a model and save it.", subcommand_class=FP8QuantizeCommand),
    )


REGISTER_COMMANDS = [FP8Command]
