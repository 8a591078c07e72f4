"""`optimum-cli fp8 …`. optimum-cli imports this file at every start, so what needs torch is imported in `run`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_fp8.commands.arguments import explain_errors
from optimum_fp8.config.flags import add_flags
from optimum_fp8.config.keys import KEYS


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
        files = parser.add_argument_group("quantizing the files of a checkpoint, without its model")
        files.add_argument("--without-model", action="store_true", help="file by file; dynamic or weight-only schemes")
        files.add_argument("--workers", type=int, default=1, help="with it: how many processes write files")
        files.add_argument("--share-scales", action="store_true", help="with it: one scale for q, k and v, gate and up")
        add_flags(parser.add_argument_group("keys of FP8Config (they win over --config)"))
        explain_errors(parser)

    def run(self) -> None:
        if self.args.without_model:
            from optimum_fp8.files.command import main
        else:
            from optimum_fp8.commands.quantize import main

        raise SystemExit(main(self.args))


class FP8MeasureCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 measure`: a model and data in, measurements out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Run calibration data through a model, and write the ranges that scales are made from."
        parser.add_argument("--model", required=True, help="folder or hub name of the model")
        parser.add_argument("--output", help="folder and beginning of a file name; the same as --dump-stats-path")
        parser.add_argument("--config", help="JSON file with an FP8Config, or one written for INC")
        _add_overwrite(parser)
        parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        add_flags(parser.add_argument_group("keys of FP8Config (they win over --config)"))
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.commands.measure import main

        raise SystemExit(main(self.args))


class FP8MergeCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 merge`: measurements of several runs in, one file out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Merge the measurements of several runs, or ranks, over the same model."
        parser.add_argument("measurements", nargs="+", help="what was --output when they were measured, or the files")
        _add_prefix(parser)
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.commands.merge import main

        raise SystemExit(main(self.args))


class FP8ImportIncCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 import-inc`: files of INC's in, measurements out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Make measurements of what Intel Neural Compressor measured, of all ranks."
        parser.add_argument("measurements", help="INC's dump_stats_path, its folder, or one of the files")
        _add_prefix(parser)
        parser.add_argument(
            "--model", help="folder or hub name of the model: checks names and weights, and signs for it"
        )
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.commands.inc import main_import

        raise SystemExit(main_import(self.args))


class FP8ExportIncCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 export-inc`: measurements in, files of INC's out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Write measurements as Intel Neural Compressor does, for its mode QUANTIZE."
        parser.add_argument("measurements", help="what was --output when they were measured")
        parser.add_argument("--output", required=True, help="INC's dump_stats_path: a folder and a beginning of a name")
        _add_overwrite(parser)
        parser.add_argument("--vllm", action="store_true", help="names of modules as in vLLM, with fused layers")
        parser.add_argument("--ranks", type=int, default=0, help="write files for so many ranks (default: no ranks)")
        parser.add_argument("--model", help="the model: scales of channels need its weights, vLLM's queries its factor")
        add_flags(parser.add_argument_group("keys of FP8Config (with --scale-method scales are written, too)"))
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.commands.inc import main_export

        raise SystemExit(main_export(self.args))


class FP8ExportCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 export`: an FP8 checkpoint in, one that another engine loads out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Write an FP8 checkpoint in the format of another engine, such as vLLM or SGLang."
        parser.add_argument("--model", required=True, help="folder of the FP8 checkpoint")
        parser.add_argument("--output", required=True, help="folder to write to, which is not there yet")
        parser.add_argument("--format", default="compressed-tensors", help="compressed-tensors or fp8")
        parser.add_argument(
            "--without", nargs="+", default=[], metavar="SCALE", help="scales of attention to leave out, as p_scale"
        )
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.exporting.command import main

        raise SystemExit(main(self.args))


class FP8SelftestCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 selftest`: a machine in, a table of what its operators compute out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Run every operator on a device and compare with the reference: what to do first on a "
        parser.description += "machine, and to attach to a report of something wrong. Status 0: all is well."
        parser.add_argument("--device", help="hpu, cuda or cpu (default: the accelerator that is there)")
        parser.add_argument(
            KEYS["target"].flag, help="number formats: of gaudi2, gaudi3, cuda or cpu (default: the device's)"
        )
        parser.add_argument("--backend", help="run this backend only: what it refuses is not run otherwise")
        parser.add_argument("--operator", action="append", default=[], help="only this one; may be given again")
        parser.add_argument("--json", metavar="FILE", help="write everything to a file as well")
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.commands.selftest import main

        raise SystemExit(main(self.args))


def _add_prefix(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="folder and beginning of a file name to write to")
    _add_overwrite(parser)


def _add_overwrite(parser: ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


class FP8Command(BaseOptimumCLICommand):
    """`optimum-cli fp8`."""

    COMMAND = CommandInfo(name="fp8", help="FP8 quantization of Hugging Face models.")
    SUBCOMMANDS = (
        CommandInfo(name="quantize", help="Quantize a model and save it.", subcommand_class=FP8QuantizeCommand),
        CommandInfo(name="measure", help="Measure a model.", subcommand_class=FP8MeasureCommand),
        CommandInfo(name="merge", help="Merge measurements.", subcommand_class=FP8MergeCommand),
        CommandInfo(name="import-inc", help="Read INC's measurements.", subcommand_class=FP8ImportIncCommand),
        CommandInfo(name="export-inc", help="Write measurements for INC.", subcommand_class=FP8ExportIncCommand),
        CommandInfo(name="export", help="Write a checkpoint for another engine.", subcommand_class=FP8ExportCommand),
        CommandInfo(name="selftest", help="Test the operators on this machine.", subcommand_class=FP8SelftestCommand),
    )


REGISTER_COMMANDS = [FP8Command]
