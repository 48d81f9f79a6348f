import dataclasses
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from fuseformer.models import EncoderDecoder, ModelConfig, Sequences, generate, pack_ids

CONFIG = ModelConfig(vocab_size=50, width=16, heads=2, layers=2, hidden=24, max_length=20)
SOURCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
TARGETS = [[1, 8, 2], [1, 2, 8, 4, 5, 9], [1]]


def model(config=CONFIG):
    torch.manual_seed(0)
    made = EncoderDecoder(config).double()
    with torch.no_grad():  # norms start out as the identity, which would hide a wrong one
        for name, parameter in made.named_parameters():
            if "embedding" not in name:
                parameter += (0.3 if parameter.dim() > 1 else 0.1) * torch.randn_like(parameter)
    return made.eval()


def textbook_embedding(model, ids):
    """Equations of section 3.5, value by value."""
    weight = model.embedding.tokens.weight
    width = weight.shape[1]
    table = torch.tensor(
        [
            [
                (math.sin if i % 2 == 0 else math.cos)(p / 10000 ** (i // 2 * 2 / width))
                for i in range(width)
            ]
            for p in range(len(ids))
        ],
        dtype=weight.dtype,
    ).view(len(ids), width)
    return weight[torch.tensor(ids, dtype=torch.long)] * math.sqrt(width) + table


def textbook_attention(q, k, v, out_proj, causal, heads):
    outputs = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        logits = a @ b.T / math.sqrt(a.shape[1])
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        outputs.append(torch.softmax(logits, -1) @ c)
    return out_proj(torch.cat(outputs, 1))


def textbook_norm(norm, x):
    return F.layer_norm(x, (x.shape[1],), norm.weight, norm.bias)


def textbook_block(block, x, causal, memory=None):
    heads = block.attention.heads
    q, k, v = block.attention.in_proj(x).chunk(3, 1)
    attended = textbook_attention(q, k, v, block.attention.out_proj, causal, heads)
    x = textbook_norm(block.attention_norm, x + attended)
    if memory is not None:
        cross = block.cross_attention
        q, (k, v) = cross.q_proj(x), cross.kv_proj(memory).chunk(2, 1)
        attended = textbook_attention(q, k, v, cross.out_proj, False, heads)
        x = textbook_norm(block.cross_attention_norm, x + attended)
    ffn = block.feed_forward
    return textbook_norm(block.feed_forward_norm, x + ffn.linear2(F.relu(ffn.linear1(x))))


def textbook(model, source, target):
    """Return the hidden states of one pair, through plain PyTorch alone."""
    memory, x = textbook_embedding(model, source), textbook_embedding(model, target)
    for block in model.encoder:
        memory = textbook_block(block, memory, False)
    for block in model.decoder:
        x = textbook_block(block, x, True, memory)
    return x


def test_packed_pairs_equal_the_textbook_one_by_one():
    transformer = model()
    hidden = transformer(*pack_ids(SOURCES), *pack_ids(TARGETS))
    expected = [textbook(transformer, s, t) for s, t in zip(SOURCES, TARGETS, strict=True)]
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=1e-6, atol=1e-6)
    for source, target, alone in zip(SOURCES, TARGETS, expected, strict=True):
        got = transformer(*pack_ids([source]), *pack_ids([target]))
        torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_every_gradient_equal_the_textbook(smoothing):
    transformer = model()
    input_ids, positions, where = pack_ids(TARGETS)
    targets = (input_ids * 7 + 3) % 50
    targets[::4] = -100
    loss = transformer.loss(
        *pack_ids(SOURCES), input_ids, positions, targets, where, label_smoothing=smoothing
    )
    hidden = torch.cat([textbook(transformer, s, t) for s, t in zip(SOURCES, TARGETS, strict=True)])
    logits = hidden @ transformer.embedding.tokens.weight.T
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    names, parameters = zip(*transformer.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters)
    for name, a, e in zip(names, got, torch.autograd.grad(expected, parameters), strict=True):
        assert e.abs().max() > 0 or name.endswith("proj.bias"), name
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, msg=name)


def test_reductions_agree():
    transformer = model()
    input_ids, positions, where = pack_ids(TARGETS)
    targets = input_ids.clone()
    targets[2] = -100
    arguments = (*pack_ids(SOURCES), input_ids, positions, targets, where)
    each = transformer.loss(*arguments, reduction="none")
    assert each.shape == targets.shape
    assert each[2] == 0
    torch.testing.assert_close(transformer.loss(*arguments, reduction="sum"), each.sum())
    torch.testing.assert_close(transformer.loss(*arguments), each.sum() / (len(targets) - 1))


def test_the_decoder_is_causal_and_the_encoder_is_not():
    transformer = model()
    changed = [[1, 8, 3], *TARGETS[1:]]
    before = transformer(*pack_ids(SOURCES), *pack_ids(TARGETS))
    after = transformer(*pack_ids(SOURCES), *pack_ids(changed))
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])
    memory = transformer.encode(*pack_ids([[3, 1, 4]]))
    other = transformer.encode(*pack_ids([[3, 1, 5]]))
    assert (memory - other).abs().max(1).values.min() > 1e-6


def test_generation_equals_full_recomputation_greedily():
    transformer = model()
    expected = []
    for source in SOURCES:
        ids = [1]
        for _ in range(9):
            hidden = textbook(transformer, source, ids)
            ids.append(int((hidden[-1] @ transformer.embedding.tokens.weight.T).argmax()))
        expected.append(ids[1:])
    assert len({tuple(e) for e in expected}) == 3
    transformer.train()
    transformer.encoder[0].eval()
    assert generate(transformer, SOURCES, 9, start_id=1) == expected
    assert transformer.training
    assert transformer.decoder[0].training
    assert not transformer.encoder[0].training
    end = expected[2][3]
    stopped = generate(transformer, SOURCES, 9, start_id=1, end_id=end)
    assert stopped == [e[: e.index(end)] if end in e else e for e in expected]


def test_cached_states_equal_those_of_the_whole_target():
    transformer = model()
    begun = [t[:1] if n != 1 else t[:3] for n, t in enumerate(TARGETS)]
    hidden, cache = transformer.prefill(*pack_ids(SOURCES), *pack_ids(begun), 3)
    targets = [list(t) for t in begun]
    for token in (5, 6, 7):
        expected = [textbook(transformer, s, t)[-1] for s, t in zip(SOURCES, targets, strict=True)]
        torch.testing.assert_close(hidden, torch.stack(expected), rtol=1e-6, atol=1e-6)
        hidden = transformer.step(torch.full((3,), token), cache)
        targets = [[*t, token] for t in targets]


def test_dropout_acts_in_training_alone():
    transformer = model()
    arguments = (*pack_ids(SOURCES), *pack_ids(TARGETS))
    assert torch.equal(transformer(*arguments), transformer(*arguments))
    transformer.train()
    torch.manual_seed(1)
    first = transformer(*arguments)
    assert not torch.equal(first, transformer(*arguments))
    torch.manual_seed(1)
    assert torch.equal(first, transformer(*arguments))


@pytest.mark.parametrize("part", ["cross_attention", "cross_attention_norm", "attention"])
def test_every_dropout_of_the_decoder_is_there(part):
    """Each alone changes the result; so none is forgotten."""
    transformer = model()
    transformer.get_submodule(f"decoder.0.{part}").training = True
    arguments = (*pack_ids(SOURCES), *pack_ids(TARGETS))
    assert not torch.equal(transformer(*arguments), transformer(*arguments))


def test_it_compiles_whole_and_a_new_length_compiles_nothing():
    transformer = model(dataclasses.replace(CONFIG, layers=1))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(transformer, fullgraph=True, backend=counter)
    for n in range(2, 6):
        arguments = (
            *pack_ids([[3] * n, [9] * (n + 2)]),
            *pack_ids([[1] * (n + 1), list(range(n))]),
        )
        torch.testing.assert_close(compiled(*arguments), transformer(*arguments))
    assert counter.frame_count <= 2  # for the first length, and for any


def test_half_precision_by_autocast_reaches_loss_and_generation():
    transformer = model().float().train()
    input_ids, positions, where = pack_ids(TARGETS)
    arguments = (*pack_ids(SOURCES), input_ids, positions, input_ids, where)
    with torch.autocast("cpu", torch.bfloat16):
        loss = transformer.loss(*arguments)
        generated = generate(transformer, SOURCES, 4, start_id=1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters())
    assert [len(g) for g in generated] == [4] * 3


def test_an_empty_source_has_nothing_to_say():
    transformer = model()
    hidden = transformer(*pack_ids([[], [4, 5]]), *pack_ids([[1, 2], [1]]))
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[2:], textbook(transformer, [4, 5], [1]), rtol=1e-6, atol=1e-6)
    assert len(generate(transformer, [[], [4]], 3, start_id=1)[0]) == 3


def test_bad_input_is_named():
    transformer = model()
    sources, targets = pack_ids(SOURCES), pack_ids(TARGETS)
    with pytest.raises(ValueError, match=r"source_ids: got a sequence of 21 .* max_length 20"):
        transformer(*pack_ids([[1] * 21]), *pack_ids([[1]]))
    with pytest.raises(ValueError, match=r"input_ids: got a sequence of 21 .* max_length 20"):
        transformer(*pack_ids([[1]]), *pack_ids([[1] * 21]))
    with pytest.raises(ValueError, match="source_where: got 1 sequences, expected 3 as where"):
        transformer(*pack_ids([[1, 2]]), *targets)
    with pytest.raises(ValueError, match="source_ids: got values from 1 to 50, expected 0 to 49"):
        transformer(*pack_ids([[1], [50], [2]]), *targets)
    with pytest.raises(ValueError, match="input_ids: got values from -1 to 1, expected 0 to 49"):
        transformer(*sources, *pack_ids([[1], [-1], [1]]))
    with pytest.raises(ValueError, match=r"source_positions: got torch.int64 of shape \(2,\)"):
        transformer(sources[0], sources[1][:2], sources[2], *targets)
    wrong = targets[1].clone()
    wrong[1] = 20
    with pytest.raises(ValueError, match=r"positions: got values from 0 to 20, expected 0 to 19"):
        transformer(*sources, targets[0], wrong, targets[2])
    with pytest.raises(ValueError, match=r"input_ids: got torch.float32"):
        transformer(*sources, targets[0].float(), *targets[1:])
    short = Sequences(torch.tensor([0, 3, 9, 9], dtype=torch.int32), 6)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        transformer(*sources, targets[0], targets[1], short)
    with pytest.raises(ValueError, match="input_ids: got an empty target"):
        transformer.prefill(*sources, *pack_ids([[1], [], [1]]), 2)
    with pytest.raises(ValueError, match="start_id: got None"):
        generate(transformer, SOURCES, 2)
    with pytest.raises(ValueError, match="max_length 20"):
        generate(transformer, SOURCES, 20, start_id=1)
    with pytest.raises(ValueError, match="reduction"):
        transformer.loss(*sources, targets[0], targets[1], targets[0], targets[2], "median")
    assert generate(transformer, [], 2, start_id=1) == []
