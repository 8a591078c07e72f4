"""`optimum-cli fp8 …`. optimum-cli imports this file at every start, so what needs torch is imported in `run`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_fp8.commands.arguments import explain_errors
from optimum_fp8.config.keys import add_flags


class FP8QuantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 quantize`: a checkpoint in, an FP8 checkpoint out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Quantize a model to FP8 and save it as a checkpoint that from_pretrained loads."
        parser.add_argument("--model", required=True, help="folder or hub name of the model")
        parser.add_argument("--output", required=True, help="folder to write the FP8 checkpoint to")
        parser.add_argument("--config", help="JSON file with an FP8Config, or one written for INC")
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
        parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        add_flags(parser.add_argument_group("keys of FP8Config (they win over --config)"))
        explain_errors(parser)

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
