"""Anonymous memory while a model is loaded and run, each in a fresh process, watched from outside.

    python -m benchmarks.memory

Pages of the checkpoint that are merely mapped do not count: the system drops them when it needs memory. What counts is
`RssAnon` of /proc/PID/status, read every millisecond by the parent, which no lock in the child can keep from looking.
"""

from __future__ import annotations

import argparse
import re
import select
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import machine, models
from .failures import Rivals
from .rivals import ROOT, Transformers
from .table import Row, report

PART_OF_WEIGHTS, ON_TOP = 0.56, 150 * machine.MIB
INTERVAL = 0.001
KINDS = ("bf16", "FP8", "FP8 checkpoint", "int8")


@dataclass(frozen=True)
class Peak:
    """Bytes of anonymous memory: after importing torch and transformers' model, after all imports, and at most."""

    base: int
    imports: int
    peak: int

    @property
    def rise(self) -> int:
        return self.peak - self.imports


def anonymous(status: str) -> int:
    """RssAnon in bytes, of the text of a /proc/PID/status."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc/PID/status has no RssAnon: this needs Linux 4.5 or newer, and a process that lives")
    return int(found[1]) * 1024


def peak(kind: str, folder: Path, scale_method: str) -> Peak:
    """Load and run a model in a fresh process, and watch it.

    Raises:
        RuntimeError: the process ended early; what it said is above.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--child", kind, str(folder), scale_method]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        status = Path(f"/proc/{child.pid}/status")
        _expect(child, b"torch and transformers\n")
        base = anonymous(status.read_text())
        _go_on(child)
        _expect(child, b"imported\n")
        imports = highest = anonymous(status.read_text())
        _go_on(child)
        while not select.select([child.stdout], [], [], INTERVAL)[0]:
            highest = max(highest, anonymous(status.read_text()))
        _expect(child, b"done\n")
        return Peak(base, imports, max(highest, anonymous(status.read_text())))


def _go_on(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()


def _expect(child: subprocess.Popen[bytes], word: bytes) -> None:
    assert child.stdout is not None
    if (line := child.stdout.readline()) != word:
        raise RuntimeError(f"the watched process said {line!r} instead of {word!r}: its own message is above")


def live(kind: str, folder: Path, scale_method: str) -> None:
    """The life of a watched process: import, wait, load, take a long prompt and decode, wait."""
    machine.prepare()
    from transformers import LlamaForCausalLM  # noqa: F401

    _tell("torch and transformers")
    if kind.startswith("FP8"):
        import optimum_fp8  # noqa: F401
    _tell("imported")
    model: Any = (
        models.load_int8(folder) if kind == "int8" else models.load(folder, scale_method if kind == "FP8" else None)
    )
    Transformers(model).decode(models.prompt(1, 512, model.config.vocab_size), 8)
    _tell("done")


def _tell(word: str) -> None:
    """Say where this process is, and wait to be told to go on (or that nobody watches any more)."""
    print(word, flush=True)
    sys.stdin.readline()


def run(scale_method: str = models.SCALES_PER_CHANNEL, folder: Path | None = None) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about them."""
    folder = folder or models.llama()
    saved = models.in_fp8(folder, scale_method)
    rivals, peaks = Rivals(["int8"]), dict[str, Peak]()
    for kind in KINDS:
        where = saved if kind == "FP8 checkpoint" else folder
        if (seen := rivals.attempt(kind, partial(peak, kind, where, scale_method))) is not None:
            peaks[kind] = seen
    allowed = PART_OF_WEIGHTS * models.weight_bytes(folder) + ON_TOP
    ours = peaks["FP8"]
    others = [kind for kind in ("bf16", "int8") if kind in peaks]
    beside = ", ".join(f"{kind} {_mib(peaks[kind].peak)}" for kind in others)
    rise = ", ".join(f"{kind} {_mib(peaks[kind].rise)}" for kind in others)
    return [
        *(
            Row(what, _mib(found.peak), f"allowed {_mib(allowed)}; {beside}", found.peak / allowed, 1.0, at_most=True)
            for what, found in (
                ("peak memory: loading and quantizing, 512 tokens, decoding", ours),
                ("peak memory: loading an FP8 checkpoint, the same", peaks["FP8 checkpoint"]),
            )
        ),
        Row(
            "peak memory, quantizing, above what the imports took",
            _mib(ours.rise),
            rise,
            ours.rise / allowed,
            at_most=True,
        ),
        *rivals.rows("peak memory"),
    ], [
        f"memory is RssAnon; allowed are {PART_OF_WEIGHTS} x bf16's weights ({_mib(models.weight_bytes(folder))}) "
        f"+ {_mib(ON_TOP)}; the imports take {_mib(ours.imports)}, of which torch and transformers {_mib(ours.base)}"
    ]


def _mib(size: float) -> str:
    return f"{size / machine.MIB:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale-method", default=models.SCALES_PER_CHANNEL)
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "SCALE_METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, folder, scale_method = options.child
        live(kind, Path(folder), scale_method)
        return
    found, notes = run(options.scale_method)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
