"""Scripts run in several processes at once as a launcher starts them, forked from one that has transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fresh import TRANSFORMERS

LIMIT = 100  # seconds

_START = """
import json, os, signal, socket, sys, traceback

sys.path.insert(0, sys.argv[1])
body, count = sys.argv[2], int(sys.argv[3])
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = []
for rank in range(count):
    children.append(os.fork())
    if children[-1]:
        continue
    signal.alarm({limit})
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    output = os.open(f"rank{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 0
    try:
        exec(compile(body, "<body>", "exec"), {"__name__": "__main__", "rank": rank, "count": count})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps(codes))
""".replace("{limit}", str(LIMIT))


@dataclass
class Ended:
    """How one rank ended, and what it printed."""

    status: int
    output: str


def run_ranks(body: str, count: int, folder: Path) -> list[Ended]:
    """Run `body` in so many processes in a folder; it finds its `rank` and the `count`, and modules of the tests."""
    done = TRANSFORMERS.try_to_run(_START, str(Path(__file__).parent), body, str(count), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return [Ended(code, (folder / f"rank{rank}.txt").read_text()) for rank, code in enumerate(codes)]


def succeed(body: str, count: int, folder: Path) -> None:
    """Run `body`, in all ranks without an error."""
    for rank, ended in enumerate(run_ranks(body, count, folder)):
        assert ended.status == 0, f"rank {rank}: {ended.output}"
