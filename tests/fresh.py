"""Scripts run in interpreters that have imported what this package builds on, and nothing of it.

Importing torch and transformers takes seconds. So one process imports them and forks for each script, which finds an
interpreter as if it had made these imports itself. Where the imports are the question, start a process: `cold`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

LIMIT = 300  # seconds that a script may take


class Interpreter:
    """A process with some modules imported, started when the first script is run in a fork of it."""

    def __init__(self, *modules: str):
        self.modules = modules
        self._process: subprocess.Popen[str] | None = None

    def try_to_run(
        self, script: str, *arguments: str, folder: Path | str = ".", killed_after: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script, with `arguments` in `sys.argv[1:]`, in a folder.

        With `killed_after` it is killed (-9) so many seconds after it first flushed what it prints.
        """
        with tempfile.TemporaryDirectory() as streams:
            stdout, stderr = Path(streams, "stdout"), Path(streams, "stderr")
            stdout.touch()
            stderr.touch()
            question = [killed_after, script, arguments, str(Path(folder).resolve()), str(stdout), str(stderr)]
            status = self._ask(json.dumps(question))
            return subprocess.CompletedProcess(script, status, stdout.read_text(), stderr.read_text())

    def run(self, script: str, *arguments: str, folder: Path | str = ".") -> str:
        """What a script prints; it fails by raising."""
        done = self.try_to_run(script, *arguments, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _ask(self, question: str) -> int:
        if self._process is None:
            command = [sys.executable, __file__, *self.modules]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # only a process without threads is safe to fork
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(question, file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RuntimeError(f"the process that imports {', '.join(self.modules)} ended: it said why") from None

    def close(self) -> None:
        """End the process; the next script starts another."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


# All that transformers.modeling_utils imports and that is not its own: it is quickly imported then.
TORCH = Interpreter("torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "accelerate")
TRANSFORMERS = Interpreter("transformers.modeling_utils", "transformers.pipelines")


def cold(script: str, folder: Path | str = ".") -> str:
    """What a script prints in a process of its own, into which nothing was imported."""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def serve(modules: list[str]) -> None:
    """Import modules, then fork for each question of standard input; to each the child's exit status is the answer."""
    for name in modules:
        import_module(name)
    for line in sys.stdin:
        killed_after, *question = json.loads(line)
        child = os.fork()
        if child == 0:
            answer(*question)
        if killed_after is not None:
            kill(child, killed_after, stdout=question[-2])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def kill(child: int, seconds: float, stdout: str) -> None:
    """Kill a child so many seconds after it first printed; one that has ended waits for its status to be read."""
    while not os.path.getsize(stdout) and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)


def answer(script: str, arguments: list[str], folder: str, stdout: str, stderr: str) -> NoReturn:
    """Run a script as `python -c` does, and end without taking down all that was imported, which takes seconds."""
    signal.alarm(LIMIT)
    os.chdir(folder)
    for number, name in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv, sys.path[0] = ["-c", *arguments], ""
    sys.modules["__main__"] = main = ModuleType("__main__")
    status: object = 0
    try:
        exec(compile(script, "<script>", "exec"), vars(main))
    except SystemExit as request:
        status = request.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1:])
