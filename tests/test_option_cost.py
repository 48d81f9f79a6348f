"""Options cost only when used: the main loop of a call without any has no trace of them."""

import importlib

import pytest
import torch
from planted import planted_kernels

from bench import binaries

BF16 = torch.bfloat16
#: Where options enter a loop over blocks that hide nothing, and what is there without them.
PLACES = {
    "attention_logits.py": (
        "    local_rows = tl.arange(0, products.shape[1 - AXIS])  # (BLOCK_M,)\n",
        "    return products, scoring.scale_log2, 1.0\n",
    ),
    "attention.py": ("        if DROPOUT:\n", "        if False:\n"),
    "attention_gradients.py": ("DROPOUT:\n", "DROPOUT and False:\n"),
}


def full_loops(kernels, dim):
    """Return the scores of forward and backward of a call without options, by kernel."""
    recorded_launches = importlib.import_module(f"{kernels.__package__}.common").recorded_launches
    q = torch.empty(2, 4, 1024, dim, dtype=BF16, device="meta")
    given = (None,) * 5 + (None, "none", -1, -1, 0.0, 0.125, 0.0)
    with recorded_launches("sm_80") as specs:
        out, lse = kernels.attention_forward(q, q, q, *given)
        kernels.attention_backward(out, None, q, q, q, out, lse, *given, False)
    found = {}
    for spec in specs:
        binary = binaries.build(spec, 80, scored=True)
        if binary.products:
            found[spec.kernel.__name__] = binary.score
    assert len(found) == 3
    return found


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("file", PLACES)
def test_the_main_loop_is_as_if_options_did_not_exist(file, dim, tmp_path):
    with planted_kernels(tmp_path, "attention", file, PLACES[file][0], PLACES[file][0]) as kernels:
        shipped = full_loops(kernels, dim)
    with planted_kernels(tmp_path / "without", "attention", file, *PLACES[file]) as kernels:
        assert full_loops(kernels, dim) == shipped
