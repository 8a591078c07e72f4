"""`optimum-cli fp8 …`. optimum-cli imports this file at every start, so what needs torch is imported in `run`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_fp8.commands.arguments import explain_errors
from optimum_fp8.config.flags import add_flags
from optimum_fp8.config.keys import KEYS
from optimum_fp8.config.requantizing import OF_MEASURING, OF_SCALES


class FP8QuantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 quantize`: a checkpoint in, an FP8 checkpoint out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Quantize a model to FP8 and save it as a checkpoint that from_pretrained loads."
        parser.add_argument("--model", required=True, help="folder or hub name of the model")
        parser.add_argument("--output", required=True, help="folder to write the FP8 checkpoint to")
        parser.add_argument("--config", help="JSON file with an FP8Config, or one written for INC")
        parser.add_argument("--preset", help="FP8, FP8_DYNAMIC, FP8_BLOCK, MXFP8 or W8A16: as checkpoints of that name")
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
        parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        parser.add_argument(
            "--verify", action="store_true", help="load what was written in a fresh process, and compare"
        )
        files = parser.add_argument_group("quantizing the files of a checkpoint, without its model")
        files.add_argument("--without-model", action="store_true", help="file by file; dynamic or weight-only schemes")
        files.add_argument("--workers", type=int, default=1, help="with it: how many processes write files")
        files.add_argument("--share-scales", action="store_true", help="with it: one scale for q, k and v, gate and up")
        add_flags(parser.add_argument_group("keys of FP8Config (they win over --config)"))
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.verifying.command import check_written, verify_written

        if not self.args.without_model:
            from optimum_fp8.commands.quantize import main

            self.args.check = check_written if self.args.verify else None
            raise SystemExit(main(self.args))

        from optimum_fp8.files.command import main

        status = main(self.args)
        if status == 0 and self.args.verify:
            status = verify_written(self.args.output, self.args.model)
        raise SystemExit(status)


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
        parser.add_argument("--format", default="compressed-tensors", help="compressed-tensors, fp8, modelopt or inc")
        parser.add_argument(
            "--without", nargs="+", default=[], metavar="SCALE", help="scales of attention to leave out, as p_scale"
        )
        parser.add_argument("--verify", action="store_true", help="check what was written, as `fp8 verify` does")
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.exporting.command import main
        from optimum_fp8.verifying.command import verify_written

        status = main(self.args)
        if status == 0 and self.args.verify:
            status = verify_written(self.args.output)
        raise SystemExit(status)


class FP8VerifyCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 verify`: an FP8 checkpoint in, what is wrong with it out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Say what is wrong with an FP8 checkpoint, of ours or of another engine's format. Status "
        parser.description += "0: nothing, warnings aside."
        parser.add_argument("folder", help="folder of the FP8 checkpoint")
        parser.add_argument("--against", metavar="BASE", help="folder of the model it was made of: compare all weights")
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.verifying.command import main

        raise SystemExit(main(self.args))


class FP8MergeLoraCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 merge-lora`: an FP8 checkpoint and a LoRA adapter in, the merged FP8 checkpoint out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Merge a LoRA adapter of peft's into an FP8 checkpoint, tensor by tensor."
        parser.add_argument("model", help="folder of the FP8 checkpoint")
        parser.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
        parser.add_argument("--output", required=True, help="folder to write to, which is not there yet")
        parser.add_argument(
            "--trained-on", required=True, choices=("base", "fp8"), help="what the adapter was trained beside"
        )
        parser.add_argument("--original", help="the model that was quantized: merges into it, and rounds once")
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.adapters.command import main

        raise SystemExit(main(self.args))


class FP8InspectCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 inspect`: a checkpoint in, what it is out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Say what an FP8 checkpoint is: formats, sizes, scales, and of ours what made it."
        parser.add_argument("checkpoint", help="folder of the checkpoint, whoever wrote it")
        parser.add_argument("--json", action="store_true", help="print everything as JSON")
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.rescaling.inspect_command import main

        raise SystemExit(main(self.args))


class FP8RescaleCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 rescale`: an FP8 checkpoint in, one with other scales out, without data."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Write an FP8 checkpoint with the scales of another method or target; needs no data."
        parser.add_argument("checkpoint", help="folder of the FP8 checkpoint")
        parser.add_argument("--output", required=True, help="folder to write to, which is not there yet")
        parser.add_argument(KEYS["scale_method"].flag, help="the scale method (default: as it is)")
        parser.add_argument(KEYS["target"].flag, help="gaudi2, gaudi3, cuda or cpu (default: as it is)")
        parser.add_argument("--original", help="folder or hub name of the model that the checkpoint was made from")
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.rescaling.command import main

        raise SystemExit(main(self.args))


class FP8RequantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli fp8 requantize`: an FP8 checkpoint in, one in another FP8 format out."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Write an FP8 checkpoint in another FP8 format, without the model in high precision."
        parser.add_argument("checkpoint", help="folder of the FP8 checkpoint")
        parser.add_argument("--output", required=True, help="folder to write to, which is not there yet")
        parser.add_argument("--preset", help="FP8, FP8_DYNAMIC, FP8_BLOCK, MXFP8 or W8A16")
        keys = parser.add_argument_group("keys of FP8Config: of scales and formats, and a dataset")
        add_flags(keys, [*OF_SCALES, *OF_MEASURING])
        explain_errors(parser)

    def run(self) -> None:
        from optimum_fp8.rescaling.command import main_requantize

        raise SystemExit(main_requantize(self.args))


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
        CommandInfo(name="merge-lora", help="Merge a LoRA adapter.", subcommand_class=FP8MergeLoraCommand),
        CommandInfo(name="inspect", help="Say what a checkpoint is.", subcommand_class=FP8InspectCommand),
        CommandInfo(name="rescale", help="Scale a checkpoint anew.", subcommand_class=FP8RescaleCommand),
        CommandInfo(name="requantize", help="Change the FP8 format.", subcommand_class=FP8RequantizeCommand),
        CommandInfo(name="verify", help="Verify a checkpoint.", subcommand_class=FP8VerifyCommand),
        CommandInfo(name="selftest", help="Test the operators on this machine.", subcommand_class=FP8SelftestCommand),
    )


REGISTER_COMMANDS = [FP8Command]
