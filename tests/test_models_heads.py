import itertools

import pytest
import torch
import torch.nn.functional as F

from fuseformer.models import (
    CausalLM,
    MaskedLM,
    ModelConfig,
    SequenceClassifier,
    SpanAnswerer,
    best_spans,
    pack_ids,
)

CONFIG = ModelConfig(vocab_size=50, width=16, heads=2, layers=1, hidden=24, max_length=20)
SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


def classifier(backbone, **options):
    torch.manual_seed(0)
    return SequenceClassifier(backbone(CONFIG), 3, **options).double().eval()


def answerer(backbone=MaskedLM):
    torch.manual_seed(0)
    return SpanAnswerer(backbone(CONFIG)).double().eval()


def check_gradients(model, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    for name, a, e in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-8, msg=name)
        assert name.endswith("in_proj.bias") or a.abs().max() > 0, name


@pytest.mark.parametrize("backbone", [MaskedLM, CausalLM])
@pytest.mark.parametrize("pooling", ["first", "last", "mean", None])
def test_classifier_equals_one_sequence_at_a_time(backbone, pooling):
    model = classifier(backbone, pooling=pooling)
    pooled = []
    for sequence in SEQUENCES:
        hidden = model.backbone(*pack_ids([sequence]))
        chosen = pooling or ("last" if backbone is CausalLM else "mean")
        states = {"first": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}
        pooled.append(states[chosen])
    scores = torch.stack(pooled) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(*pack_ids(SEQUENCES)), scores)
    model.train()
    assert torch.equal(model.predict(*pack_ids(SEQUENCES)), scores.argmax(1))
    assert model.training
    model.eval()
    labels = torch.tensor([2, 0, 1])
    ids, positions, where = pack_ids(SEQUENCES)
    for reduction in ("mean", "sum"):
        loss = model.loss(ids, positions, labels, where, reduction)
        check_gradients(model, loss, F.cross_entropy(scores, labels, reduction=reduction))
    each = model.loss(ids, positions, labels, where, "none")
    torch.testing.assert_close(each, F.cross_entropy(scores, labels, reduction="none"))


def test_a_pooled_mean_in_low_precision_is_summed_in_high():
    model = classifier(MaskedLM)
    hidden = torch.full((3000, 16), 0.1, dtype=torch.bfloat16)
    where = pack_ids([[1] * 3000])[2]
    torch.testing.assert_close(model.pool(hidden, where), hidden[:1])


@pytest.mark.parametrize("backbone", [MaskedLM, CausalLM])
def test_span_loss_equals_one_sequence_at_a_time(backbone):
    model = answerer(backbone)
    starts, ends = torch.tensor([1, 0, 2]), torch.tensor([3, 0, 7])
    expected = []
    for sequence, start, end in zip(SEQUENCES, starts, ends, strict=True):
        s, e = model(*pack_ids([sequence]))
        both = F.cross_entropy(s[None], start[None]) + F.cross_entropy(e[None], end[None])
        expected.append(both / 2)
    ids, positions, where = pack_ids(SEQUENCES)
    loss = model.loss(ids, positions, starts, ends, where)
    check_gradients(model, loss, torch.stack(expected).mean())
    each = model.loss(ids, positions, starts, ends, where, "none")
    torch.testing.assert_close(each, torch.stack(expected))
    total = model.loss(ids, positions, starts, ends, where, "sum")
    torch.testing.assert_close(total, torch.stack(expected).sum())


def test_span_scores_of_any_size_stay_finite():
    model = answerer()
    with torch.no_grad():
        model.scorer.weight *= 1e4
    zeros = torch.zeros(3, dtype=torch.int64)
    ids, positions, where = pack_ids(SEQUENCES)
    assert model.loss(ids, positions, zeros, zeros, where).isfinite()


def spans_by_force(starts, ends, max_length, allowed):
    """Return the best span of one sequence by looking at every one."""
    best = (-1, -1, -torch.inf)
    for i, j in itertools.product(range(len(starts)), repeat=2):
        score = float(starts[i] + ends[j])
        if i <= j < i + max_length and allowed[i] and allowed[j] and score > best[2]:
            best = (i, j, score)
    return best


@pytest.mark.parametrize("max_length", [1, 2, 3, 30])
@pytest.mark.parametrize("restricted", [False, True])
def test_best_spans_equal_those_found_by_looking_at_all(max_length, restricted):
    generator = torch.Generator().manual_seed(max_length)
    for _ in range(20):
        lengths = torch.randint(0, 9, (5,), generator=generator).tolist()
        where = pack_ids([[1] * n for n in lengths])[2]
        starts, ends, chance = torch.rand(3, sum(lengths), generator=generator)
        allowed = chance > 0.6 if restricted else torch.ones_like(chance, dtype=torch.bool)
        found = best_spans(starts, ends, where, max_length, allowed if restricted else None)
        for n, part in enumerate(
            zip(starts.split(lengths), ends.split(lengths), allowed.split(lengths), strict=True)
        ):
            start, end, score = spans_by_force(part[0], part[1], max_length, part[2])
            assert (int(found.starts[n]), int(found.ends[n])) == (start, end)
            assert float(found.scores[n]) == pytest.approx(score)


def test_empty_sequences_have_no_span():
    found = best_spans(torch.empty(0), torch.empty(0), pack_ids([[], []])[2])
    assert found.starts.tolist() == found.ends.tolist() == [-1, -1]
    assert found.scores.tolist() == [-torch.inf] * 2


def test_answers_come_without_dropout():
    model = answerer()
    expected = best_spans(*model(*pack_ids(SEQUENCES)), pack_ids(SEQUENCES)[2], 3)
    model.train()
    got = model.answer(*pack_ids(SEQUENCES), 3)
    assert model.training
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head", [classifier, lambda backbone: answerer()])
def test_the_dropout_of_a_head_acts_in_training_alone(head):
    model = head(MaskedLM)

    def first():
        result = model(*pack_ids(SEQUENCES))
        return result[0] if isinstance(result, tuple) else result

    assert torch.equal(first(), first())
    model.dropout.train()  # the backbone's stay off
    assert not torch.equal(first(), first())


def test_a_classifier_learns_what_only_a_token_tells():
    torch.manual_seed(0)
    model = SequenceClassifier(MaskedLM(CONFIG), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sequences = [torch.randint(2, 50, (n,)).tolist() for n in range(4, 20)]
    labels = torch.tensor([n % 2 for n in range(16)])
    for sequence, label in zip(sequences, labels.tolist(), strict=True):
        sequence[len(sequence) // 2] = label
    ids, positions, where = pack_ids(sequences)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(ids, positions, labels, where).backward()
        optimizer.step()
    assert torch.equal(model.predict(ids, positions, where), labels)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="pooling: got 'max', expected one of first, last, mean"):
        classifier(MaskedLM, pooling="max")
    with pytest.raises(ValueError, match="classes: got 0"):
        SequenceClassifier(MaskedLM(CONFIG), 0)
    model, spans = classifier(MaskedLM), answerer()
    ids, positions, where = pack_ids(SEQUENCES)
    with pytest.raises(ValueError, match="labels: got 3 for sequence 1, expected 0 to 2"):
        model.loss(ids, positions, torch.tensor([0, 3, 1]), where)
    with pytest.raises(ValueError, match=r"labels: got torch.int64 of shape \(2,\)"):
        model.loss(ids, positions, torch.tensor([0, 1]), where)
    with pytest.raises(ValueError, match="where: got an empty sequence"):
        model(*pack_ids([[1], []]))
    zeros = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="ends: got 5 for sequence 0, expected 0 to 4"):
        spans.loss(ids, positions, zeros, torch.tensor([5, 0, 0]), where)
    with pytest.raises(ValueError, match="ends: got one before its start"):
        spans.loss(ids, positions, torch.tensor([0, 0, 3]), torch.tensor([0, 0, 2]), where)
    with pytest.raises(ValueError, match="reduction: got 'median'"):
        spans.loss(ids, positions, zeros, zeros, where, "median")
    with pytest.raises(ValueError, match="max_length: got 0"):
        spans.answer(ids, positions, where, 0)
    with pytest.raises(ValueError, match=r"allowed: got torch.int64"):
        spans.answer(ids, positions, where, 3, ids)
