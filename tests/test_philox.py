import pytest
import torch

from fuseformer.philox import (
    draw_seed,
    dropout_scale,
    dropout_threshold,
    keep_mask,
    philox_4x32,
)

# Known-answer vectors of the paper's reference implementation: counter and key of all zeros, of all
# ones, and of the digits of pi.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox_4x32(torch.tensor(key), *(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_mask_follows_the_definition_element_by_element():
    seed, p, batch, head = torch.tensor(-987654321987654321), 0.3, 5, 3
    keep = keep_mask(seed, p, range(batch, batch + 1), range(head, head + 1), range(40), 70)
    for i in range(40):
        for j in range(70):
            counter = (j // 32 * 8 + j % 8, i // 16 * 8 + i % 8, head, batch)
            words = philox_4x32(seed, *(torch.tensor(c) for c in counter))
            number = (int(words[j // 8 % 4]) >> (16 * (i // 8 % 2))) & 0xFFFF
            assert bool(keep[0, 0, i, j]) == (number >= dropout_threshold(p)), (i, j)


@pytest.mark.parametrize("rows", [range(0, 50), range(16, 33), range(5, 6), range(7, 7)])
def test_row_ranges_are_slices_of_the_whole_mask(rows):
    seed = torch.tensor(7)
    whole = keep_mask(seed, 0.4, range(2), range(3), range(50), 33)
    part = keep_mask(seed, 0.4, range(1, 2), range(1, 3), rows, 33)
    assert torch.equal(part, whole[1:2, 1:3, rows.start : rows.stop])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rate_and_scale(p):
    keep = keep_mask(torch.tensor(11), p, range(1), range(4), range(256), 512)
    count = keep.numel()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(1 - keep.float().mean().item() - p) <= 5 * deviation + 2**-17
    realised = 1 - dropout_threshold(p) / 65536
    assert dropout_scale(p) == (1 / realised if realised else 0.0)


def test_manual_seed_governs_the_drawn_seed():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
