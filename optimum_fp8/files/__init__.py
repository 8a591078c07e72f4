"""Quantizing the files of a checkpoint, shard by shard, without building the model."""

from .without_model import FilesReport, quantize_files

__all__ = ["FilesReport", "quantize_files"]
