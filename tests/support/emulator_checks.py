"""What the emulator of CUDA C++ kernels must do: values of its instructions, and mistakes seen.

Checks take the module that `load` returns, or that of an emulator with a planted bug.
"""

import numpy as np
import torch
from emulator_build import SOURCES, build

INTS = np.arange(32, dtype=np.int32)
OUT = np.full(32, 7, dtype=np.int32)


def load(runtime=SOURCES):
    unit = SOURCES / "emulator" / "self_test_kernels.cpp"
    return build("shadow", unit, bindings="self_test_bindings", host=(), runtime=runtime)


def run(
    emulator,
    name,
    given=INTS,
    out=None,
    value=0,
    *,
    written=False,
    landing="late",
    rounding="exact",
    random=False,
    seed=1,
):
    """Return what a kernel wrote, its counters, and its errors."""
    out = OUT.copy() if out is None else out
    emulator.set_options(random, seed, landing, rounding, 80)
    emulator.report()
    source = emulator.allocate(given.nbytes, given.ctypes.data)
    target = emulator.allocate(out.nbytes, out.ctypes.data if written else 0)
    emulator.run(name, source, target, value)
    emulator.copy(out.ctypes.data, target, out.nbytes)
    emulator.release_all()
    report = emulator.report()
    return out, report["counters"], "\n".join(report["errors"])


def check_mma(emulator, dtype, rounding):
    """Fragments as the tables of the PTX manual have them, element by element."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    a_bits, b_bits = (x.view(torch.int16).numpy().view(np.uint16) for x in (a, b))
    words = np.zeros(320, dtype=np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for i in range(8):  # a0 to a7 of the manual
            row = group + (8 if i in (2, 3, 6, 7) else 0)
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            words[4 * lane + i // 2] |= np.uint32(a_bits[row, column]) << np.uint32(16 * (i & 1))
        for i in range(4):  # b0 to b3
            row = thread * 2 + (i & 1) + (8 if i >= 2 else 0)
            words[128 + 2 * lane + i // 2] |= np.uint32(b_bits[row, group]) << np.uint32(
                16 * (i & 1)
            )
        for i in range(4):  # c0 to c3
            place = (group + (8 if i >= 2 else 0), thread * 2 + (i & 1))
            words[192 + 4 * lane + i] = c.numpy()[place].view(np.uint32)
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    out, counters, errors = run(
        emulator, f"mma_{kind}", words, np.zeros(128, np.float32), rounding=rounding
    )
    assert not errors
    assert counters["mma"] == 1
    exact = a.double() @ b.double() + c.double()
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for i in range(4):
            place = (group + (8 if i >= 2 else 0), thread * 2 + (i & 1))
            got, want = float(out[4 * lane + i]), float(exact[place])
            if rounding == "exact":
                assert got == np.float32(want)
            else:
                assert abs(got - want) < 1e-5
    return out


def check_mma_of_tf32(emulator, rounding="exact"):
    """Fragments of m16n8k8 as the manual has them; bits below those of tf32 are not read."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=generator) for s in ((16, 8), (8, 8), (16, 8)))
    a_bits, b_bits, c_bits = (x.numpy().view(np.uint32) for x in (a, b, c))
    words = np.zeros(320, dtype=np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for i in range(4):  # a0 to a3
            row, column = group + (8 if i in (1, 3) else 0), thread + (4 if i >= 2 else 0)
            words[4 * lane + i] = a_bits[row, column]
            words[192 + 4 * lane + i] = c_bits[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)]
        for i in range(2):
            words[128 + 2 * lane + i] = b_bits[thread + 4 * i, group]
    out, counters, errors = run(
        emulator, "mma_tf32", words, np.zeros(128, np.float32), rounding=rounding
    )
    assert not errors
    assert counters["mma"] == 1
    cut = [torch.from_numpy((x & np.uint32(0xFFFFE000)).view(np.float32)) for x in (a_bits, b_bits)]
    exact = cut[0].double() @ cut[1].double() + c.double()
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for i in range(4):
            want = float(exact[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)])
            got = float(out[4 * lane + i])
            assert got == np.float32(want) if rounding == "exact" else abs(got - want) < 1e-5


def check_rounding_to_tf32(emulator):
    """To nearest, ties away from zero, as IEEE rounding of the fraction to ten bits does."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(512, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (512,), generator=generator
    )
    values[:6] = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 0.0, -0.0, np.inf])
    out, _, errors = run(emulator, "round_tf32", values.numpy(), np.zeros(512, np.uint32))
    assert not errors
    fraction, exponent = np.frexp(values.double().numpy())
    units = np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), fraction)
    expected = np.ldexp(units, exponent - 11).astype(np.float32)
    expected[5] = np.inf
    assert (out.view(np.float32) == expected).all()
    assert (out & np.uint32(0x1FFF) == 0).all()


def check_ldmatrix(emulator, transposed):
    name = "ldmatrix_transposed" if transposed else "ldmatrix"
    out, counters, errors = run(emulator, name, out=np.zeros(128, np.uint32), value=16)
    assert not errors
    assert counters["ldmatrix_conflicts"] == 0
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if transposed:
                    row, column = column, row
                got = out[4 * lane + matrix] >> np.uint32(16 * half) & np.uint32(0xFFFF)
                assert got == 8 * (8 * matrix + row) + column


def check_conflicts(emulator):
    for stride, conflicts in ((16, 0), (32, 4), (128, 28)):
        _, counters, _ = run(emulator, "ldmatrix", out=np.zeros(128, np.uint32), value=stride)
        assert counters["ldmatrix_conflicts"] == conflicts


def check_conflicts_of_one_row(emulator):
    """What several lanes point to is read once."""
    _, counters, errors = run(emulator, "ldmatrix_of_one_row", out=np.zeros(32, np.uint32))
    assert not errors
    assert counters["ldmatrix_conflicts"] == 0


def check_plain_conflicts(emulator):
    """Bank cycles of 32 words of four bytes, and of four times eight of sixteen."""
    cycles = {4: 0, 8: 1, 32: 7, 128: 31, -16: 0, -32: 4, -128: 28, 0: 0}
    for stride, conflicts in cycles.items():
        _, counters, errors = run(emulator, "plain_conflicts", value=stride)
        assert not errors
        assert counters["shared_conflicts"] == conflicts, stride


def check_registers(emulator):
    """What a kernel has not set is no number, whichever block has had the stack before."""
    out, _, _ = run(emulator, "accumulator_not_set", out=np.zeros(12, np.float32))
    assert np.isnan(out).all()


def check_shuffle(emulator):
    for mask in (1, 2, 4, 8, 16, 31):
        out, _, errors = run(emulator, "shuffle", out=np.zeros(32, np.float32), value=mask)
        assert not errors
        assert (out == (INTS ^ mask)).all()


def check_conversions(emulator):
    """All 16-bit patterns; rounding against PyTorch's, ties and subnormal numbers among them."""
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out, _, errors = run(emulator, f"widen_{kind}", out=np.zeros(1 << 16, np.float32))
        assert not errors
        patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
        assert torch.equal(torch.from_numpy(out).nan_to_num(7.0), patterns.nan_to_num(7.0))
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(512, generator=generator) * 10.0 ** torch.randint(
            -9, 6, (512,), generator=generator
        )
        values[:8] = torch.tensor([1.0, -0.0, 65519.9, 65520.0, 1 + 2**-9, 1 + 3 * 2**-9, 6e-8, 0])
        packed, _, errors = run(
            emulator, f"pack_{kind}", values.numpy(), np.zeros(256, dtype=np.uint32)
        )
        assert not errors
        expected = values.to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (packed.view(np.uint16) == expected).all()


def check_copy_groups(emulator):
    given = np.arange(128, dtype=np.uint32)
    out = np.zeros(256, dtype=np.uint32)
    for landing in ("late", "early", "random"):
        out, counters, errors = run(emulator, "copy_groups", given, out, 1, landing=landing)
        assert not errors
        assert counters["copies"] == 64
        assert (out.reshape(32, 8)[:, :4] == given.reshape(32, 4)).all()
        assert not out.reshape(32, 8)[:, 4:].any()
    # A weaker wait lets nothing land, and is seen for that whenever copies land.
    for landing in ("late", "early"):
        out, _, errors = run(emulator, "copy_groups", given, out, 2, landing=landing)
        assert "on its way" in errors
        late = (out.reshape(32, 8)[:, :4] == 0xFFFFFFFF).all()
        assert late == (landing == "late")


def check_named_barrier(emulator):
    for seed in range(3):
        out, _, errors = run(emulator, "named", value=3, random=True, seed=seed)
        assert not errors
        assert (out == 31 - INTS).all()


def check_sums(emulator):
    out, _, errors = run(emulator, "sums", out=np.zeros(1, np.float32), written=True)
    assert not errors
    assert out[0] == 256


def check_turns(emulator):
    out, _, errors = run(emulator, "turns", out=np.zeros(1, np.int32), written=True)
    assert not errors
    assert out[0] == 4
    for random in (False, True):
        zero = np.zeros(1, np.int32)
        _, _, errors = run(emulator, "turns", out=zero, value=1, written=True, random=random)
        assert "the turn 1 does not come" in errors


def check_order_of_blocks(emulator):
    """Blocks go on in any order, but for those that take turns."""

    def total(**options):
        out, _, errors = run(emulator, "order", out=np.zeros(2, np.int32), written=True, **options)
        assert not errors
        return out.view(np.float32)[1]

    in_order = np.float32(0)
    for number in [1.0, 2.0**26, 3.0, -(2.0**26)] * 4:
        in_order += np.float32(number)
    seeds = range(1, 9)
    assert total() == total(value=1) == in_order
    assert {total(random=True, seed=seed) for seed in seeds} == {in_order}
    assert len({total(random=True, seed=seed, value=1) for seed in seeds}) > 1


def check_philox(emulator):
    """The known answers of Random123: counter and key all ones, and digits of pi."""
    for words, expected in (
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        given, out = np.array(words, dtype=np.uint32), np.zeros(4, np.uint32)
        out, _, _ = run(emulator, "philox", given, out)
        assert out.tolist() == expected


def check_uninitialised(emulator):
    _, _, errors = run(emulator, "uninitialised_shared")
    assert "read of shared memory that nobody has written" in errors


def check_exchange(emulator):
    for seed in range(3):
        out, counters, errors = run(
            emulator, "exchange", out=np.zeros(64, np.int32), random=True, seed=seed
        )
        assert not errors
        assert (out == 64 - np.arange(64)).all()
        assert counters["barriers"] == 256
    for value in (1, 2):
        _, _, errors = run(emulator, "exchange", out=np.zeros(64, np.int32), value=value)
        assert "race: " in errors


CHECKS = [
    check_mma_of_tf32,
    check_rounding_to_tf32,
    check_conflicts,
    check_conflicts_of_one_row,
    check_plain_conflicts,
    check_registers,
    check_shuffle,
    check_conversions,
    check_copy_groups,
    check_named_barrier,
    check_sums,
    check_turns,
    check_order_of_blocks,
    check_philox,
    check_exchange,
]


#: Kernels that do something wrong, and what the emulator must say of it.
MISTAKES = {
    "turn_of_a_later_block": "does not come",
    "turn_is_kept": "ends without passing on its turn",
    "sum_after_its_turn": "a sum outside of its turn",
    "sum_before_its_turn": "a sum outside of its turn",
    "sum_beside_the_wait": "a sum outside of its turn",
    "turn_beside_the_sum": "turn",  # one of two errors, as it comes
    "read_past_global": "out of bounds: read of 4 bytes",
    "write_past_global": "out of bounds: write of 4 bytes",
    "read_past_shared": "out of bounds: read of 4 bytes",
    "write_past_shared": "out of bounds: write of 4 bytes",
    "copy_past_shared": "out of bounds: asynchronous copy to beside",
    "copy_past_global": "out of bounds: asynchronous copy from beside",
    "copy_misaligned": "misaligned asynchronous copy",
    "ldmatrix_past_shared": "out of bounds: row of ldmatrix",
    "misaligned": "misaligned access to global memory",
    "uninitialised_shared": "read of shared memory that nobody has written",
    "uninitialised_global": "read of global memory that nobody has written",
    "race_of_writes": "race: write of shared memory that another thread writes",
    "race_of_blocks": "race: write of global memory that another block writes",
    "read_in_flight": "read where an asynchronous copy is on its way",
    "divergent": "divergent warp",
    "left_barrier": "have left",
    "deadlock": "deadlock: 32 threads wait for a named barrier",
    "race_of_blocks_that_read": "race: write of global memory that another block reads",
    "sum_of_uninitialised": "read of global memory that nobody has written",
    "copies_to_one_place": "asynchronous copy to where another is on its way",
    "barrier_of_no_such_number": "barrier 16 of 32 threads",
    "barrier_of_two_sizes": "threads, where others wait for",
    "wild_pointer": "fault: access to address",
    "division_by_zero": "fault: ",
    "index_past_registers": "fault: undefined behaviour",
}


def everything(emulator):
    check_mma(emulator, torch.bfloat16, "exact")
    check_ldmatrix(emulator, False)
    for check in CHECKS:
        check(emulator)
    for name, said in MISTAKES.items():
        for random in (False, True):
            _, _, errors = run(emulator, name, random=random)
            assert said in errors
    # Some blocks run at the same time: the later ones are there to pass the turn on.
    _, _, errors = run(emulator, "turn_of_a_later_block", random=True)
    assert "by a block of a larger number" in errors
