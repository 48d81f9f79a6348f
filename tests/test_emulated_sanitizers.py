"""The CUDA C++ kernels, their launch code and the emulator under the compiler's own sanitizers.

``make test-sanitizers`` runs them: all is compiled anew for that.
"""

import os

import pytest
import sanitized

pytestmark = pytest.mark.skipif(
    os.environ.get("FUSEFORMER_SANITIZERS") != "full", reason="`make test-sanitizers` runs it"
)


def test_kernels_are_clean_in_random_order_and_any_landing():
    done = sanitized.start("kernels")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"{landing}: clean" for landing in sanitized.LANDINGS]


def test_what_is_right_runs_to_its_end():
    done = sanitized.start("shuffle")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "shuffle: ran to its end" in done.stdout


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("read_past_global", "AddressSanitizer: use-after-poison"),
        ("write_past_global", "AddressSanitizer: use-after-poison"),
        ("read_past_shared", "AddressSanitizer: use-after-poison"),
        ("write_past_shared", "AddressSanitizer: use-after-poison"),
        ("index_past_registers", "runtime error: index"),
        ("misaligned", "runtime error: load of misaligned address"),
        ("division_by_zero", "runtime error: division by zero"),
    ],
)
def test_a_mistake_ends_the_process(mistake, said):
    done = sanitized.start(mistake)
    assert done.returncode != 0
    assert said in done.stderr
    assert "self_test_mistakes.h" in done.stderr
