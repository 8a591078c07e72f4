"""Intel Gaudi's FP8 operators on a CPU: `with gaudi.emulated("gaudi2") as device:`.

An independent oracle: number formats, scales and roundings are written here once more, from what is published of the
hardware and of its PyTorch bridge, and nothing of `optimum_fp8.ops` or `optimum_fp8.scales` is used.
"""

from .calls import Call, Scale, TensorSpec
from .device import BRIDGES, CHIPS, Device
from .emulate import emulated

__all__ = ["BRIDGES", "CHIPS", "Call", "Device", "Scale", "TensorSpec", "emulated"]
