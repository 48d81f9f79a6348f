import pytest
import torch
import torch.nn.functional as F

from fuseformer.models import MaskedLM, ModelConfig, Sequences, pack_ids
from fuseformer.models.blocks import sinusoidal_positions
from fuseformer.packing import pack, plan_packing

CONFIG = ModelConfig(vocab_size=50, width=16, heads=2, layers=2, hidden=24, max_length=20)
SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


def model(**changes):
    torch.manual_seed(0)
    config = ModelConfig(**{**vars(CONFIG), **changes})
    made = MaskedLM(config).double()
    with torch.no_grad():  # norms start out as the identity, which would hide a wrong one
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def torch_nn(lm, ids, padding):
    """Return the logits (B, S, V) of a padded batch, through torch.nn's encoder layers."""
    config = lm.config
    x = F.embedding(ids, lm.embedding.tokens.weight) * config.width**0.5
    x = x + sinusoidal_positions(ids.shape[1], config.width).double()
    layer = torch.nn.TransformerEncoderLayer(
        config.width, config.heads, config.hidden, 0.0, config.activation, batch_first=True
    ).double()  # in training mode, where torch.nn takes no shortcut; without dropout the same
    for block in lm.blocks:
        weights = {}
        for ours, theirs in (
            (block.attention.out_proj, "self_attn.out_proj"),
            (block.attention_norm, "norm1"),
            (block.feed_forward.linear1, "linear1"),
            (block.feed_forward.linear2, "linear2"),
            (block.feed_forward_norm, "norm2"),
        ):
            weights.update({f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias})
        weights["self_attn.in_proj_weight"] = block.attention.in_proj.weight
        weights["self_attn.in_proj_bias"] = block.attention.in_proj.bias
        x = torch.func.functional_call(
            layer, weights, (x,), {"src_key_padding_mask": padding}, strict=True
        )
    return x @ lm.embedding.tokens.weight.T


def padded(sequences):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, torch.arange(ids.shape[1]) >= lengths[:, None]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_packed_equals_padded_torch_nn_in_loss_and_every_gradient(activation):
    lm = model(activation=activation)
    ids, padding = padded(SEQUENCES)
    targets = (ids * 7 + 3) % 50
    targets[:, ::3] = -100
    packing = plan_packing(padding)
    packed = [pack(x, packing) for x in (ids, targets)]
    where = Sequences(packing.cu_seqlens, packing.max_seqlen)

    logits = torch_nn(lm, ids, padding)
    hidden = lm(packed[0], packing.positions(), where)
    torch.testing.assert_close(lm.logits(hidden), pack(logits, packing), rtol=1e-6, atol=1e-6)

    loss = lm.loss(packed[0], packing.positions(), packed[1], where)
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.masked_fill(padding, -100).flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters)
    for name, a, e in zip(names, got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, msg=name)


def test_tokens_see_both_sides_and_no_other_sequence():
    lm = model()
    before = lm(*pack_ids(SEQUENCES))
    after = lm(*pack_ids([[3, 1, 4, 1, 6], *SEQUENCES[1:]]))
    assert (before[:5] - after[:5]).abs().amax(1).min() > 1e-6
    assert torch.equal(before[5:], after[5:])
    for sequence, part in zip(SEQUENCES, before.split([5, 1, 8]), strict=True):
        torch.testing.assert_close(lm(*pack_ids([sequence])), part)


def test_reductions_agree():
    lm = model()
    ids, positions, where = pack_ids(SEQUENCES)
    targets = ids.clone()
    targets[4] = -100
    each = lm.loss(ids, positions, targets, where, "none")
    assert each.shape == ids.shape
    assert each[4] == 0
    torch.testing.assert_close(lm.loss(ids, positions, targets, where, "sum"), each.sum())
    torch.testing.assert_close(lm.loss(ids, positions, targets, where), each.sum() / 13)


def test_dropout_acts_in_training_alone():
    lm = model()
    assert torch.equal(lm(*pack_ids(SEQUENCES)), lm(*pack_ids(SEQUENCES)))
    lm.train()
    torch.manual_seed(1)
    first = lm(*pack_ids(SEQUENCES))
    assert not torch.equal(first, lm(*pack_ids(SEQUENCES)))
    torch.manual_seed(1)
    assert torch.equal(first, lm(*pack_ids(SEQUENCES)))


def test_every_dropout_of_the_block_is_there():
    """Each of the four kinds alone changes the result; so none is forgotten."""
    for part in ("embedding.dropout", "attention", "attention_norm", "feed_forward"):
        lm = model()
        module = lm.get_submodule(part if "." in part else f"blocks.0.{part}")
        module.training = True
        assert not torch.equal(lm(*pack_ids(SEQUENCES)), lm(*pack_ids(SEQUENCES))), part


def test_bad_input_is_named():
    lm = model()
    with pytest.raises(ValueError, match=r"input_ids: got a sequence of 21 .* max_length 20"):
        lm(*pack_ids([[1] * 21]))
    with pytest.raises(ValueError, match="input_ids: got values from 1 to 50, expected 0 to 49"):
        lm(*pack_ids([[1, 50]]))
    ids, positions, where = pack_ids(SEQUENCES)
    with pytest.raises(ValueError, match=r"positions: got torch.int64 of shape \(13,\)"):
        lm(ids, positions[1:], where)
    with pytest.raises(ValueError, match=r"target: got shape \(13,\)"):
        lm.loss(ids, positions, ids[1:], where)
    with pytest.raises(ValueError, match="target: got classes from 3 to 50"):
        lm.loss(ids, positions, torch.where(ids == 3, 3, 50), where)
