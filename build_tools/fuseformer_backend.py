"""The build backend: setuptools', which asks besides for what a mode needs that is missing.

Where FUSEFORMER_BUILD names a mode, the environment that a front end makes for the build gets
torch, whose headers are used, and for cuda a compiler, unless they are found already. Otherwise
nothing is asked for: a mode that nobody named takes what there is.
"""

import toolchain
from setuptools.build_meta import *  # noqa: F403 - the other hooks are setuptools' own
from setuptools.build_meta import get_requires_for_build_editable as _for_editable
from setuptools.build_meta import get_requires_for_build_wheel as _for_wheel


def _missing() -> list[str]:
    mode, found = toolchain.asked_mode(), []
    if mode in ("cpu", "cuda"):
        try:
            toolchain.find_torch()
        except toolchain.Missing:
            found.append(toolchain.TORCH_REQUIREMENT)
    if mode == "cuda":
        try:
            toolchain.find_cuda()
        except toolchain.Missing:
            found += toolchain.CUDA_REQUIREMENTS
    return found


def get_requires_for_build_wheel(config_settings=None):
    """Return what setuptools asks for, and what the mode misses."""
    return _for_wheel(config_settings) + _missing()


def get_requires_for_build_editable(config_settings=None):
    """Return what setuptools asks for, and what the mode misses."""
    return _for_editable(config_settings) + _missing()
