"""Packed batches: every token once, in an order that resumes."""

from itertools import islice, pairwise

import pytest
import torch

from fuseformer.tuning import batches
from fuseformer.tuning.batches import Example, PackedSampler
from fuseformer.tuning.examples import Examples
from fuseformer.tuning.instructions import IGNORE_INDEX

BATCH_SEED = 753646658045241277  # of the first batch with seed 5


def examples(count=30):
    return [
        batches.causal_example(list(range(10 * i, 10 * i + 2 + i % 7))) for i in range(1, count + 1)
    ]


def sampler(**options):
    return PackedSampler(examples(), **{"tokens_per_batch": 16, "max_length": 8, **options})


def same(a, b):
    return torch.equal(a.input_ids, b.input_ids) and a.seed == b.seed


def epoch(source):
    made = []
    while source.epoch == 0:
        made.append(next(source))
    return made[:-1]  # the last one opened the next epoch


def test_a_batch_is_its_sequences_end_to_end():
    batch = batches.collate([Example([5, 6, 7], [6, 7, 8]), Example([9], [IGNORE_INDEX])], seed=3)
    assert batch.input_ids.tolist() == [5, 6, 7, 9]
    assert batch.targets.tolist() == [6, 7, 8, -100]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.supervised == 3
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.max_seqlen == 3


def test_an_epoch_has_every_example_once_within_the_budget():
    made = epoch(sampler())
    seen = []
    for batch in made:
        assert len(batch.input_ids) <= 16
        bounds = batch.cu_seqlens.tolist()
        seen += [tuple(batch.input_ids[a:b].tolist()) for a, b in pairwise(bounds)]
    assert sorted(seen) == sorted(tuple(e.input_ids) for e in examples())


def test_orders_differ_between_epochs_and_seeds_and_not_between_runs():
    first = list(islice(sampler(), 40))
    assert all(same(a, b) for a, b in zip(first, islice(sampler(), 40), strict=True))
    assert not same(first[0], next(sampler(seed=1)))
    steps = len(epoch(sampler()))
    assert not same(first[0], first[steps])
    assert len({batch.seed for batch in first}) == 40
    assert next(sampler(shuffle=False)).input_ids[0] == 10


def test_the_seed_of_a_batch_does_not_depend_on_the_process():
    # Python's own hash of a string would.
    assert next(sampler(seed=5)).seed == BATCH_SEED


@pytest.mark.parametrize("taken", [0, 1, 5, 11, 27])
def test_a_resumed_sampler_continues(taken):
    whole = list(islice(sampler(), 40))
    first = sampler()
    for _ in range(taken):
        next(first)
    resumed = sampler(seed=99)
    resumed.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(whole[taken:], islice(resumed, 40 - taken), strict=True))


def test_states_of_other_data_are_refused():
    with pytest.raises(ValueError, match="other data"):
        sampler().load_state_dict({"seed": 0, "epoch": 0, "position": 31})
    with pytest.raises(ValueError, match="want seed, epoch, position"):
        sampler().load_state_dict({"seed": 0})


def test_long_examples_are_errors_or_cut_by_name():
    with pytest.raises(ValueError, match="one has 7 tokens, the model takes 6"):
        sampler(max_length=6)
    for batch in epoch(sampler(max_length=3, truncation="right")):
        assert batch.max_seqlen <= 3
    with pytest.raises(ValueError, match="truncation"):
        sampler(truncation="left")
    with pytest.raises(ValueError, match="want at least 7"):
        sampler(tokens_per_batch=6)
    with pytest.raises(ValueError, match="got none"):
        PackedSampler([], tokens_per_batch=6, max_length=6)


def test_chunks_of_a_document_predict_each_token_once():
    document = list(range(10, 31))
    made = batches.causal_chunks([document, []], 8, bos_id=1, eos_id=2)
    assert [len(e.input_ids) for e in made] == [8, 8, 6, 1]
    assert [t for e in made for t in e.targets] == [*document, 2, 2]
    assert [t for e in made[:-1] for t in e.input_ids] == [1, *document]
    whole = batches.masked_chunks([document], 8, bos_id=1, eos_id=2)
    assert [t for e in whole for t in e.input_ids] == [1, *document, 2]
    with pytest.raises(ValueError, match="max_length"):
        batches.causal_chunks([document], 0, bos_id=1, eos_id=2)


def test_labels_are_shifted():
    made = batches.causal_example([1, 5, 6, 7], [-100, -100, 6, 7])
    assert (made.input_ids, made.targets) == ([1, 5, 6], [-100, 6, 7])
    with pytest.raises(ValueError, match="labels"):
        batches.causal_example([1, 2], [1])
    with pytest.raises(ValueError, match="at least 2"):
        batches.causal_example([1])


MASKING = {"mask_id": 3, "vocab_size": 1000, "special_ids": (0, 1, 2, 3, 4)}


def test_masking_has_its_shares_and_spares_special_tokens():
    ids = [1, *([7, 8, 9] * 10_000), 2]
    batch = batches.collate([Example(ids, [-100] * len(ids))], seed=11)
    masked = batches.mask_tokens(batch, **MASKING)
    chosen = masked.targets != IGNORE_INDEX
    assert abs(chosen.float().mean() - 0.15) < 0.01
    assert torch.equal(masked.targets[chosen], batch.input_ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], batch.input_ids[~chosen])
    inputs, before = masked.input_ids[chosen], batch.input_ids[chosen]
    assert abs((inputs == 3).float().mean() - 0.8) < 0.02
    assert abs((inputs == before).float().mean() - 0.1) < 0.02
    assert inputs[inputs != 3].min() >= 5
    assert not chosen[0]
    assert not chosen[-1]
    again = batches.mask_tokens(batch, **MASKING)
    assert torch.equal(again.input_ids, masked.input_ids)


def test_masking_always_leaves_something_to_learn():
    for seed in range(20):
        batch = batches.collate([Example([1, 7, 2], [-100] * 3)], seed=seed)
        masked = batches.mask_tokens(batch, **MASKING)
        assert masked.targets.tolist() == [-100, 7, -100]
    nothing = batches.collate([Example([1, 2], [-100] * 2)])
    assert batches.mask_tokens(nothing, **MASKING).supervised == 0
    with pytest.raises(ValueError, match="share"):
        batches.mask_tokens(nothing, **MASKING, share=0)


def test_sources_and_targets_are_packed_apart():
    made = [
        batches.seq2seq_example([5, 6], [7], bos_id=1, eos_id=2),
        batches.seq2seq_example([8], [9, 10, 11], bos_id=1, eos_id=2),
    ]
    batch = next(PackedSampler(made, tokens_per_batch=20, max_length=4, shuffle=False))
    assert batch.source_ids.tolist() == [5, 6, 2, 8, 2]
    assert batch.source_cu_seqlens.tolist() == [0, 3, 5]
    assert batch.source_max_seqlen == 3
    assert batch.source_positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.input_ids.tolist() == [1, 7, 1, 9, 10, 11]
    assert batch.targets.tolist() == [7, 2, 9, 10, 11, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 6]
    assert batch.to("meta").source_ids.device.type == "meta"


def test_examples_in_arrays_are_the_examples(monkeypatch):
    monkeypatch.setattr("fuseformer.tuning.examples.BLOCK", 2)
    made = [Example([1, 5, 70_000], [5, 70_000, 2]), Example([], []), Example([7], [-100])]
    stored = Examples(Example, made)
    assert list(stored) == made == stored
    assert (stored[-1], stored[0:2]) == (made[-1], made[0:2])
    assert [stored.tokens(i) for i in range(3)] == [3, 0, 1]
    assert stored.longest() == 3
    with pytest.raises(IndexError):
        stored[3]
    small = Examples(Example, made[1:])
    assert small.fingerprint() != stored.fingerprint()
