"""The main job on the embedded models, a language model and two classifiers: quantize, compare, save and reload.

python examples/demo.py
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (("llm/quantize_llm.py", "--windows", "64"), ("vision/quantize_vision.py",))

if __name__ == "__main__":
    for script, *arguments in SCRIPTS:
        sys.argv = [script, *arguments]
        runpy.run_path(str(HERE / script), run_name="__main__")
