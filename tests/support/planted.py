"""Copies of the kernels with a bug in them, which the checks of the real ones must catch."""

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import fuseformer.kernels


@contextmanager
def planted_kernels(
    folder: Path, module: str, file: str, correct: str, wrong: str
) -> Iterator[ModuleType]:
    """Load `module` from a copy of the kernels, in `folder`, with a text replaced in one file.

    A text that is no longer there fails: a bug that cannot be planted would pass for caught.
    """
    package = f"planted_kernels_{len(sys.modules)}"
    copy = folder / package
    shutil.copytree(Path(fuseformer.kernels.__path__[0]), copy)
    source = (copy / file).read_text()
    assert correct in source, f"{file} has changed: plant the bug anew"
    (copy / file).write_text(source.replace(correct, wrong))
    spec = importlib.util.spec_from_file_location(
        package, copy / "__init__.py", submodule_search_locations=[str(copy)]
    )
    assert spec is not None
    assert spec.loader is not None
    root = importlib.util.module_from_spec(spec)
    sys.modules[package] = root
    try:
        spec.loader.exec_module(root)
        yield importlib.import_module(f"{package}.{module}")
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] == package:
                del sys.modules[name]
