"""The launches known to spill registers: whatever tiles were tried, some were left over.

All compute dk and dv with dropout and something that acts on the logits at once, at the largest
head dims. What spills is a few of 255 registers, once a block of queries. Any other spill, and one
of these that is gone, fails the tests and `python -m bench scores`.
"""

from .launches import architecture

_OPTIONS = "seed bias slopes window_left window_right softcap"
#: Architectures by the launch's name.
KNOWN_SPILLS: dict[str, set[str]] = {}


def is_known(name: str, capability: int) -> bool:
    """Return whether a launch of this name is known to spill on an architecture."""
    return architecture(capability) in KNOWN_SPILLS.get(name, ())
