"""A script in a fork is told apart from one in a process of its own by nothing but its imports."""

import json

import fresh
import pytest

TABNANNY = fresh.Interpreter("tabnanny")  # a small module that nothing else imports

STATE = "import json, os, sys; print(json.dumps([sys.argv, sys.path[0], os.getcwd(), __name__, sys.stdin.read()]))"


@pytest.fixture(scope="module", autouse=True)
def few_imports():
    yield
    TABNANNY.close()


def test_modules_are_there_and_forks_know_nothing_of_each_other():
    script = "import sys; print('tabnanny' in sys.modules, 'this' in sys.modules); sys.modules['this'] = None"
    assert [TABNANNY.run(script) for _ in range(2)] == ["True False\n"] * 2
    assert json.loads(fresh.cold("import json, sys; print(json.dumps('tabnanny' in sys.modules))")) is False


def test_a_script_finds_what_python_c_gives(tmp_path):
    assert json.loads(TABNANNY.run(STATE, "one", "2 3", folder=tmp_path)) == [
        ["-c", "one", "2 3"],
        "",
        str(tmp_path.resolve()),
        "__main__",
        "",
    ]


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("print('done')", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("import os; os.kill(os.getpid(), 15)", -15, ""),
    ],
)
def test_the_exit_status_is_that_of_the_script(script, status, told):
    done = TABNANNY.try_to_run(script)
    assert (done.returncode, done.stderr) == (status, told)
    assert done.stdout == ("done\n" if status == 0 and "print" in script else "")


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_script_is_killed_after_it_has_begun(seconds):
    script = "import time; print('begun', flush=True); time.sleep(0.1); print('done', flush=True); time.sleep(60)"
    done = TABNANNY.try_to_run(script, killed_after=seconds)
    assert done.returncode == -9 and done.stdout.startswith("begun")
    done = TABNANNY.try_to_run("raise SystemExit(3)", killed_after=seconds)  # before it has printed anything
    assert done.returncode == 3


def test_a_script_that_raises_fails_with_its_traceback():
    assert "ValueError: no" in TABNANNY.try_to_run("raise ValueError('no')").stderr
    with pytest.raises(AssertionError, match="ValueError: no"):
        TABNANNY.run("raise ValueError('no')")


def test_an_interpreter_that_cannot_import_its_modules_is_named():
    with pytest.raises(RuntimeError, match="no_such_module"):
        fresh.Interpreter("no_such_module").run("print(1)")
