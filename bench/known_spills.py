"""The launches known to spill registers: whatever tiles were tried, some were left over.

All but one compute dk and dv with every option at once, at head dims 128 and 256. On sm_86 and its
like, what spills little there does not fit the shared memory. Any other spill, a larger one, and
one that is gone fail `python -m bench scores`, and the tests where they compile the launch.
"""

from typing import Any

from .launches import architecture

_EVERYTHING = "ALIGN=8 seed bias slopes window_left window_right softcap"
#: The most bytes per thread, by launch and architecture.
KNOWN_SPILLS: dict[str, dict[str, int]] = {
    f"attention_key_gradient bf16 BIAS_ALIGN=8 GROUP=2 HEAD_DIM=256 BLOCK_D=256 {_EVERYTHING}": {
        "sm_90": 32,
    },
    f"attention_key_gradient fp32 BIAS_ALIGN=8 GROUP=2 HEAD_DIM=128 BLOCK_D=128 {_EVERYTHING}": {
        "sm_80": 8,
    },
    f"attention_key_gradient fp32 BIAS_ALIGN=8 GROUP=2 HEAD_DIM=256 BLOCK_D=256 {_EVERYTHING}": {
        "sm_86": 1184,
        "sm_89": 1184,
        "sm_90": 40,
        "sm_100": 24,
        "sm_120": 1256,
    },
    "attention_query_gradient fp32 GROUP=1 HEAD_DIM=256 BLOCK_D=256 ALIGN=8 padding seed "
    "window_right": {"gfx942": 124},
}


def known_spill(name: str, capability: int) -> int:
    """Return how many bytes a launch of this name is known to spill on an architecture."""
    return KNOWN_SPILLS.get(name, {}).get(architecture(capability), 0)


def new_faults(row: dict[str, Any], known: int) -> list[str]:
    """Return the faults of a row but for a spill of at most `known` bytes."""
    allowed = 0 < row.get("spilled", 0) <= known
    return [f for f in row.get("faults", []) if not (allowed and "spilled" in f)]
