"""`import optimum_fp8` is light: it registers, and does no other work."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

PROBE = """
import json, re, sys
import torch

before = set(sys.modules)
import optimum_fp8

heavy = re.compile(r"(habana_frameworks|datasets|triton)(\\.|$)|transformers\\.models\\..*\\.modeling_")
print(json.dumps({
    "heavy": sorted(filter(heavy.match, set(sys.modules) - before)),
    "cuda initialised": torch.cuda.is_initialized(),
}))
"""


def test_import_is_light(tmp_path):
    answer = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == {"heavy": [], "cuda initialised": False}
