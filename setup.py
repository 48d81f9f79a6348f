"""Builds the package, with compiled libraries where that is possible or asked for.

FUSEFORMER_BUILD   none: Python and Triton alone
                   cpu: with the C++ library for CPUs, from a C++ compiler and torch's headers
                   cuda: with the CUDA C++ kernels besides, from a CUDA toolkit
                   auto (default): the last of these that can be had here
FUSEFORMER_ARCHS   GPU architectures, by commas, "+PTX" for code that newer GPUs compile themselves
MAX_JOBS           compilers at once; as many as there are processors unless given, at most 8
CXX                the C++ compiler, with arguments if need be; g++ unless given
CUDA_HOME          the CUDA toolkit, where another is to be used than what is found

A mode asked for by name that cannot be had is an error. `build_tools` has the parts.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# Where a build is started without its backend, as by ``python setup.py``, nobody has done this.
sys.path.insert(0, str(ROOT / "build_tools"))

import toolchain  # noqa: E402
from library import Library, record  # noqa: E402

TOOLS = toolchain.decide()


class BuildExtension(build_ext):
    """Has `_C` and `_host` compiled and linked by `build_tools`."""

    def build_extension(self, ext):
        """Build one of the two, and with `_C` the record of the build."""
        target = Path(self.get_ext_fullpath(ext.name))
        if ext.name == "fuseformer._C":
            record(target.parent, TOOLS, Library(TOOLS).build(target))
        else:
            Library(TOOLS).build_host_module(target)

    def copy_extensions_to_source(self):
        """Copy what was built beside the sources, its record too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib).resolve() / "fuseformer/_build.json"
        shutil.copyfile(built, ROOT / "python/fuseformer/_build.json")


class BuildPython(build_py):
    """Records a build without extensions too."""

    def run(self):
        """Copy the package, and write the record where no extension does."""
        super().run()
        if TOOLS.mode == "none":
            editable = self.editable_mode
            record(Path("python" if editable else self.build_lib) / "fuseformer", TOOLS, {})

    def get_outputs(self, include_bytecode=True):
        """Name the record among what is installed."""
        extra = [] if self.editable_mode else [str(Path(self.build_lib) / "fuseformer/_build.json")]
        return super().get_outputs(include_bytecode) + extra


def extensions():
    """Return the extensions of the mode, and say what was decided."""
    said = f"fuseformer: building in mode {TOOLS.mode!r}"
    if TOOLS.mode == "cuda":
        said += f" with CUDA {TOOLS.cuda} for {', '.join(TOOLS.architectures)}"
    print("; ".join((said, *TOOLS.refused)), file=sys.stderr)
    if TOOLS.mode == "none":
        return []
    return [
        Extension("fuseformer._C", [], py_limited_api=True),
        Extension("fuseformer._host", []),
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
