"""Measurement files of Intel Neural Compressor (INC): read, with its names of modules said in ours, and written."""

from .file import RANGES, SCALES, SHAPES, File, FileName, Node, read_file, write_file
from .names import FUSED, FUSED_SDPA, SOFTMAX, Renamed, in_names_of, weights_that_differ
from .read import IncMeasurements, files_of_inc, has_inc_ranges, read_inc
from .write import Nodes, inc_paths, names_of, nodes_of, scaling_of, write_inc

__all__ = [
    "FUSED",
    "FUSED_SDPA",
    "RANGES",
    "SCALES",
    "SHAPES",
    "SOFTMAX",
    "File",
    "FileName",
    "IncMeasurements",
    "Node",
    "Nodes",
    "Renamed",
    "files_of_inc",
    "has_inc_ranges",
    "in_names_of",
    "inc_paths",
    "names_of",
    "nodes_of",
    "read_file",
    "read_inc",
    "scaling_of",
    "weights_that_differ",
    "write_file",
    "write_inc",
]
