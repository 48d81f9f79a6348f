import pytest
import torch

import fuseformer as ff
from fuseformer.packing import pack, plan_packing, unpack
from fuseformer.testing import assert_close_to_reference

MASK = torch.tensor(
    [[False, False, True, True], [True, True, True, True], [True, False, False, False]]
)


def test_round_trip_with_padding_anywhere():
    packing = plan_packing(MASK)
    x = torch.randn(3, 4, 5, requires_grad=True)
    tokens = pack(x, packing)
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packing.max_seqlen == 3
    assert packing.positions().tolist() == [0, 1, 1, 2, 3]
    back = unpack(tokens, packing, padding_value=-1)
    assert torch.equal(back, torch.where(MASK[..., None], -1.0, x))
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, (~MASK)[..., None].expand(3, 4, 5).float())


def test_packed_attention_equals_padded_attention():
    torch.manual_seed(0)
    packing = plan_packing(MASK)
    q, k, v = (torch.randn(3, 4, 2, 8) for _ in range(3))
    packed = ff.varlen_attention(
        *(pack(x, packing) for x in (q, k, v)),
        *[packing.cu_seqlens] * 2,
        *[packing.max_seqlen] * 2,
    )
    padded = ff.attention(*(x.transpose(1, 2) for x in (q, k, v)), key_padding_mask=MASK)
    expected = padded.transpose(1, 2).masked_fill(MASK[..., None, None], 0)
    assert_close_to_reference(unpack(packed, packing), expected, expected)


def test_no_sequences_and_nothing_but_padding():
    for mask in (torch.zeros(0, 4, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        packing = plan_packing(mask)
        assert packing.max_seqlen == 0
        tokens = pack(torch.randn(*mask.shape, 6), packing)
        assert tokens.shape == (0, 6)
        assert torch.equal(unpack(tokens, packing), torch.zeros(*mask.shape, 6))


def test_bad_input_names_the_argument():
    packing = plan_packing(MASK)
    with pytest.raises(TypeError, match=r"key_padding_mask: got dtype torch\.float32"):
        plan_packing(MASK.float())
    with pytest.raises(ValueError, match=r"key_padding_mask: got shape \(4,\)"):
        plan_packing(MASK[0])
    with pytest.raises(ValueError, match=r"padded: got shape \(4, 3\)"):
        pack(torch.zeros(4, 3), packing)
    with pytest.raises(ValueError, match="tokens: got 4 rows, expected 5"):
        unpack(torch.zeros(4, 2), packing)


def test_a_caller_who_knows_the_sizes_gets_the_same_packing():
    expected = plan_packing(MASK)
    total = len(expected.indices)
    for longest in (expected.max_seqlen, MASK.shape[1]):
        packing = plan_packing(MASK, tokens=total, max_seqlen=longest)
        assert torch.equal(packing.indices, expected.indices)
        assert torch.equal(packing.cu_seqlens, expected.cu_seqlens)
        assert packing[2:] == (longest, *MASK.shape)
    with pytest.raises(ValueError, match="tokens: got"):
        plan_packing(MASK, tokens=total - 1)
    with pytest.raises(ValueError, match="max_seqlen: got"):
        plan_packing(MASK, max_seqlen=expected.max_seqlen - 1)


def test_known_sizes_wait_for_nothing():
    """A meta tensor has no values: whatever asks for one fails."""
    mask = MASK.to("meta")
    packing = plan_packing(mask, tokens=5, max_seqlen=4)
    assert packing.indices.shape == (5,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        plan_packing(mask)
