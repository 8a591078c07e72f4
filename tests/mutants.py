"""Tests run on mutants of the package: in one file one text is replaced, as a mistake would, and some test must fail.

Importing and collecting take seconds. So one process imports the package, collects the tests, and forks for each
mutant; the fork replaces the code of the functions of the mutated file, and runs the tests that are asked for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import fresh
import pytest
import ranks

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optimum_fp8"
LIMIT = 200  # seconds that the tests of a mutant may take


class Mutation(NamedTuple):
    """A text in a file of the package, of which there is one, and what it is replaced by."""

    file: str
    old: str
    new: str

    @property
    def module(self) -> str:
        path = Path(PACKAGE.name, self.file).with_suffix("")
        return ".".join(path.parts).removesuffix(".__init__")

    def source(self) -> str:
        """The file, mutated."""
        text = (PACKAGE / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.file} has {text.count(self.old)} times: {self.old}"
        return text.replace(self.old, self.new)

    def apply(self) -> None:
        """Give the functions of the imported module, wherever they are held, the code that the mutated file has."""
        module = import_module(self.module)
        before = dict(vars(module))
        exec(compile(self.source(), str(module.__file__), "exec"), vars(module))
        for name, value in before.items():
            if getattr(value, "__module__", None) == self.module and (isfunction(value) or isclass(value)):
                _take_code(value, vars(module)[name])
                setattr(module, name, value)
        if "register" in before:
            module.register()  # what was registered of the file, anew


def _take_code(old: Any, new: Any) -> None:
    """Give a function, what it wraps, or the methods of a class the code of others."""
    if isclass(old):
        for name, value in vars(old).items():
            if getattr(value, "__module__", None) == old.__module__ and name in vars(new):
                _take_code(value, vars(new)[name])
        return
    while not isfunction(old) or hasattr(old, "__wrapped__"):
        inside = next((name for name in ("__wrapped__", "__func__", "fget") if hasattr(old, name)), None)
        if inside is None:
            return
        old, new = getattr(old, inside), getattr(new, inside)
    old.__code__ = new.__code__


class Mutants:
    """A process that has collected the tests of some files; it starts with the first mutant."""

    def __init__(self, *files: str):
        self.files = files
        self._process: subprocess.Popen[str] | None = None

    def failures(self, mutation: Mutation | None, *tests: str) -> dict[str, str]:
        """Those of the tests, by their node ids, that fail on a mutant, each with its error; None: as the package is.

        Raises:
            RuntimeError: the tests could not be run.
        """
        if self._process is None:
            command = [sys.executable, __file__, *self.files]
            # Only a process without threads is safe to fork, and tests are to start none.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": "mutants"}
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([mutation, tests]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process of the tests ended: it said why")
        found: dict[str, str] = json.loads(answer)
        if (reason := found.pop("", None)) is not None:
            raise RuntimeError(f"{mutation}: {', '.join(tests)} did not end: {reason}")
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


class _Forks(fresh.Interpreter):
    """Runs scripts in forks of this process, which has imported a mutant."""

    def _ask(self, question: str) -> int:
        killed_after, *script = json.loads(question)
        assert killed_after is None, "no script is killed under a mutation"
        child = os.fork()
        if child == 0:
            fresh.answer(*script)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Server:
    """A plugin that runs, instead of the collected tests, those of each question of standard input."""

    def __init__(self) -> None:
        self.questions, self.answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        self.failed: dict[str, str] = {}
        for number in (0, 1):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        ranks.TRANSFORMERS = _Forks()
        items = {item.nodeid: item for item in session.items}
        for question in self.questions:
            child = os.fork()
            if child == 0:
                self._answer(items, *json.loads(question))
            if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                print(json.dumps({"": f"exit status {status}"}), file=self.answers, flush=True)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = str(report.longrepr) if crash is None else crash.message

    def _answer(self, items: dict[str, pytest.Item], mutation: list[str] | None, tests: list[str]) -> NoReturn:
        signal.alarm(LIMIT)
        try:
            if mutation is not None:
                Mutation(*mutation).apply()
            for test in tests:
                item = items[test]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if self.failed:
                    break
        except BaseException as error:
            self.failed = {"": f"{type(error).__name__}: {error}"}
        print(json.dumps(self.failed), file=self.answers, flush=True)
        os._exit(0)


def serve(files: list[str]) -> int:
    """Collect the tests of some files, and answer questions."""
    for name in ("torch._dynamo", "torch.distributed.tensor"):  # or each fork would import what it needs of them
        import_module(name)
    return int(pytest.main(["-q", "-s", "--tb=native", "-p", "no:cacheprovider", *files], plugins=[_Server()]))


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
