"""Registers the FLOP formulas of the ops when PyTorch's counter is first imported, not before.

That module imports triton, which would make the import of this package a third of a second longer.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER, _FORMULAS = "torch.utils.flop_counter", "fuseformer.ops.flops"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the counter as it is, and imports the formulas behind it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_FORMULAS)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_needed() -> None:
    """Register the formulas now if the counter is imported already, else when it is."""
    if _COUNTER in sys.modules:
        importlib.import_module(_FORMULAS)
    else:
        sys.meta_path.insert(0, _Finder())
