"""The launches known to spill registers: whatever tiles were tried, some were left over.

All but one compute dk and dv with dropout and something that acts on the logits at once, at the
largest head dims. Any other spill, a larger one, and one that is gone fail the tests and
`python -m bench scores`.
"""

from typing import Any

from .launches import architecture

#: The most bytes per thread, by launch and architecture.
KNOWN_SPILLS: dict[str, dict[str, int]] = {}


def known_spill(name: str, capability: int) -> int:
    """Return how many bytes a launch of this name is known to spill on an architecture."""
    return KNOWN_SPILLS.get(name, {}).get(architecture(capability), 0)


def new_faults(row: dict[str, Any], known: int) -> list[str]:
    """Return the faults of a row but for a spill of at most `known` bytes."""
    allowed = row.get("spilled", 0) <= known
    return [f for f in row.get("faults", []) if not (allowed and "spilled" in f)]
