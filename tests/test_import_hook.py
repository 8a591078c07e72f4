"""`when_imported` acts once a module is there, and leaves nothing behind."""

from __future__ import annotations

import importlib
import sys
import threading
from importlib.machinery import SourceFileLoader
from types import SimpleNamespace

import pytest

from optimum_fp8.import_hook import when_imported

NAME = "hooked_module"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The file of a module that can be imported, and is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1")
    yield path
    sys.modules.pop(NAME, None)


@pytest.mark.core
def test_acts_after_the_module_ran(module):
    seen: list[int] = []
    before = list(sys.meta_path)
    when_imported(NAME, lambda found: seen.append(found.value))
    assert not seen
    importlib.import_module("tabnanny")  # another module changes nothing
    assert not seen
    found = importlib.import_module(NAME)
    assert seen == [1] and sys.meta_path == before
    assert type(found.__loader__) is type(found.__spec__.loader) is SourceFileLoader
    importlib.reload(found)
    assert seen == [1]


@pytest.mark.core
def test_acts_at_once_if_it_is_there(module):
    before = list(sys.meta_path)
    found = importlib.import_module(NAME)
    seen: list[object] = []
    when_imported(NAME, seen.append)
    assert seen == [found] and sys.meta_path == before


def test_several_act_on_one_module(module):
    seen: list[str] = []
    before = list(sys.meta_path)
    when_imported(NAME, lambda found: seen.append("first"))
    when_imported(NAME, lambda found: seen.append("second"))
    importlib.import_module(NAME)
    assert sorted(seen) == ["first", "second"] and sys.meta_path == before


def test_a_module_that_does_not_exist_is_not_found(module):
    when_imported("hooked_nowhere", lambda found: None)
    with pytest.raises(ModuleNotFoundError, match="hooked_nowhere"):
        importlib.import_module("hooked_nowhere")


@pytest.mark.parametrize("fails", ["import", "act"])
def test_a_failure_is_told_and_the_next_attempt_acts(module, fails):
    seen: list[int] = []

    def act(found) -> None:
        if not seen and fails == "act":
            seen.append(0)
            raise ValueError("not this time")
        seen.append(found.value)

    if fails == "import":
        module.write_text("raise ValueError('not this time')")
    before = list(sys.meta_path)
    when_imported(NAME, act)
    with pytest.raises(ValueError, match="not this time"):
        importlib.import_module(NAME)
    assert NAME not in sys.modules
    module.write_text("value = 2  # longer than before, so that no cached bytecode fits")
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    assert seen[-1] == 2 and sys.meta_path == before


def test_waits_for_another_thread_in_the_middle_of_the_import(module, monkeypatch):
    gates = SimpleNamespace(reached=threading.Event(), go_on=threading.Event())
    monkeypatch.setitem(sys.modules, "hooked_gates", gates)
    module.write_text("import hooked_gates as gates\ngates.reached.set()\ngates.go_on.wait(60)\nvalue = 3")
    seen: list[int] = []
    importing = threading.Thread(target=importlib.import_module, args=(NAME,))
    waiting = threading.Thread(target=when_imported, args=(NAME, lambda found: seen.append(found.value)))
    importing.start()
    assert gates.reached.wait(60)
    waiting.start()
    assert not seen
    gates.go_on.set()
    importing.join()
    waiting.join()
    assert seen == [3]
