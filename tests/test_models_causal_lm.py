import pytest
import torch
import torch.nn.functional as F

from fuseformer.models.blocks import sinusoidal_positions
from fuseformer.models.causal_lm import CausalLM
from fuseformer.models.config import ModelConfig
from fuseformer.models.generation import generate, restrict
from fuseformer.models.masked_lm import MaskedLM
from fuseformer.models.sequences import Sequences

CONFIG = ModelConfig(vocab_size=50, width=16, heads=2, layers=2, hidden=24, max_length=20)


def model():
    torch.manual_seed(0)
    return CausalLM(CONFIG).double().eval()


def packed(sequences):
    lengths = [len(s) for s in sequences]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return (
        torch.tensor([token for s in sequences for token in s]),
        positions,
        Sequences(cu, max(lengths)),
    )


def plain(lm, ids):
    """Return the logits of one sequence by the textbook, through torch.nn.functional alone."""
    x = F.embedding(torch.tensor(ids), lm.embedding.tokens.weight) * 16**0.5
    x = x + sinusoidal_positions(20, 16)[: len(ids)].double()
    for block in lm.blocks:
        q, k, v = block.attention.in_proj(x).view(len(ids), 3, 2, 8).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        attended = block.attention.out_proj(out.transpose(0, 1).flatten(1))
        norm, last = block.attention_norm, block.feed_forward_norm
        x = F.layer_norm(x + attended, (16,), norm.weight, norm.bias)
        ffn = block.feed_forward
        x = F.layer_norm(x + ffn.linear2(F.relu(ffn.linear1(x))), (16,), last.weight, last.bias)
    return x @ lm.embedding.tokens.weight.T


SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


def test_packed_sequences_equal_the_textbook():
    lm = model()
    logits = lm.logits(lm(*packed(SEQUENCES)))
    torch.testing.assert_close(logits, torch.cat([plain(lm, s) for s in SEQUENCES]))


def test_loss_counts_supervised_tokens_and_reaches_every_parameter():
    lm = model()
    ids, positions, where = packed(SEQUENCES)
    targets = ids.roll(-1)
    targets[::3] = -100
    loss = lm.loss(ids, positions, targets, where)
    expected = F.cross_entropy(torch.cat([plain(lm, s) for s in SEQUENCES]), targets)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, list(lm.parameters()))
    for a, e in zip(got, torch.autograd.grad(expected, list(lm.parameters())), strict=True):
        torch.testing.assert_close(a, e)


def test_cached_generation_equals_full_recomputation():
    lm = model()
    expected = []
    for prompt in SEQUENCES:
        ids = list(prompt)
        for _ in range(7):
            ids.append(int(plain(lm, ids)[-1].argmax()))
        expected.append(ids[len(prompt) :])
    lm.train()
    assert generate(lm, SEQUENCES, 7) == expected
    assert lm.training
    end = expected[2][3]
    stopped = generate(lm, SEQUENCES, 7, end_id=end)
    assert stopped == [e[: e.index(end)] if end in e else e for e in expected]


def test_cached_states_equal_those_of_the_whole_sequence():
    lm = model()
    hidden, cache = lm.prefill(*packed(SEQUENCES), 3)
    sequences = [list(s) for s in SEQUENCES]
    for tokens in ([5, 6, 7], [8, 0, 1], [2, 2, 3]):
        expected = torch.stack([plain(lm, s)[-1] for s in sequences])
        torch.testing.assert_close(lm.logits(hidden), expected)
        hidden = lm.step(torch.tensor(tokens), cache)
        sequences = [[*s, token] for s, token in zip(sequences, tokens, strict=True)]
    torch.testing.assert_close(
        lm.logits(hidden), torch.stack([plain(lm, s)[-1] for s in sequences])
    )


def test_sampling_is_governed_by_its_generator():
    lm = model()
    runs = [
        generate(lm, SEQUENCES, 5, temperature=1.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert generate(lm, SEQUENCES, 5, temperature=2.0, top_k=1) == generate(lm, SEQUENCES, 5)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    torch.testing.assert_close(restrict(logits, 1.0, 2, None), torch.tensor([[0, 4 / 7, 0, 3 / 7]]))
    torch.testing.assert_close(
        restrict(logits, 1.0, None, 0.6), torch.tensor([[0, 4 / 7, 0, 3 / 7]])
    )
    torch.testing.assert_close(restrict(logits, 1.0, None, 0.01), torch.tensor([[0, 1.0, 0, 0]]))


def test_bad_input_is_named():
    lm = model()
    with pytest.raises(ValueError, match=r"sequence of 21 tokens.*max_length 20"):
        lm(*packed([[1] * 21]))
    with pytest.raises(ValueError, match="max_length 20"):
        generate(lm, [[1] * 15], 6)
    with pytest.raises(ValueError, match="start_id: got 1, expected None"):
        generate(lm, [[1]], 2, start_id=1)
    with pytest.raises(TypeError, match="model: got MaskedLM, expected CausalLM or EncoderDecoder"):
        generate(MaskedLM(CONFIG), [[1]], 2)
    with pytest.raises(ValueError, match="empty prompt"):
        generate(lm, [[1], []], 2)
    for options, name in (({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            generate(lm, [[1]], 2, **options)
    for change, name in (({"width": 15}, "width"), ({"dropout": 1}, "dropout")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            ModelConfig(vocab_size=9, **change)
    assert generate(lm, [], 3) == []


def test_runs_of_tokens_do_not_come_twice():
    lm = model()
    free = generate(lm, SEQUENCES, 12)
    for length in (1, 2, 3):
        blocked = generate(lm, SEQUENCES, 12, no_repeat=length)
        for before, said in zip(free, blocked, strict=True):
            runs = [tuple(said[i : i + length]) for i in range(len(said) - length + 1)]
            assert len(runs) == len(set(runs))
            # Up to the first run that came twice, nothing changes.
            same = [tuple(before[i : i + length]) for i in range(len(before) - length + 1)]
            fine = next((i for i in range(len(same)) if same[i] in same[:i]), len(same))
            assert said[: fine + length - 1] == before[: fine + length - 1]
    assert any(len(set(said)) < len(said) for said in free)
    with pytest.raises(ValueError, match="no_repeat: got 0"):
        generate(lm, SEQUENCES, 3, no_repeat=0)
