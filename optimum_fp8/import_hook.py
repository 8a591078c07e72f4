"""Doing something once a module is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile, islice
from types import ModuleType
from typing import Any


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with the module `name`: now if it is imported, else as the last step of its import.

    An import that succeeds has acted, and leaves nothing of the hook behind. An error of `act` fails the import, and
    the next attempt acts again.
    """
    finder = _Finder(name, act)
    sys.meta_path.insert(0, finder)
    if name in sys.modules:  # looked up now, with the finder in place: nobody imports it unseen in between
        finder.remove()
        act(import_module(name))  # waits for another thread that is in the middle of importing it


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and lets its loader act."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]):
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        behind = islice(dropwhile(lambda finder: finder is not self, [*sys.meta_path]), 1, None)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in behind)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Loads a module with the loader that was found for it, and acts."""

    def __init__(self, found: Any, finder: _Finder):
        self.found, self.finder = found, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.found.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.found  # from here on as if nobody had been in between
        self.found.exec_module(module)
        self.finder.act(module)
        self.finder.remove()
