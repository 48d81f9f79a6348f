import math

import pytest
import torch

from fuseformer.models import CausalLM, ModelConfig, generate, pack_ids, sequence_nll

CONFIG = ModelConfig(vocab_size=50, width=16, heads=2, layers=2, hidden=24, max_length=20)
SEQUENCES = [[3, 1, 4, 1, 5], [9], [], [2, 6, 5, 3, 5, 8, 9, 7]]


def model():
    torch.manual_seed(0)
    return CausalLM(CONFIG).double()


def by_hand(lm, sequence, labels):
    total, count = 0.0, 0
    for j in range(1, len(sequence)):
        if labels[j] != -100:
            with torch.no_grad():
                logits = lm.logits(lm(*pack_ids([sequence[:j]])))[-1]
            total -= float(torch.log_softmax(logits, -1)[labels[j]])
            count += 1
    return total, count


def test_scores_equal_those_of_one_token_at_a_time():
    lm = model().train()
    labels = [list(s) for s in SEQUENCES]
    labels[0][2] = labels[3][0] = labels[3][5] = -100
    scores = sequence_nll(lm, SEQUENCES, labels)
    assert lm.training
    lm.eval()
    assert [count for _, count in scores] == [3, 0, 0, 6]
    for (nll, _), sequence, expected in zip(scores, SEQUENCES, labels, strict=True):
        assert nll == pytest.approx(by_hand(lm, sequence, expected)[0], abs=1e-9)
    assert all(isinstance(nll, float) and isinstance(count, int) for nll, count in scores)


def test_what_generation_chose_is_what_scoring_finds_likeliest():
    lm = model()
    prompt = [3, 1, 4]
    chosen = generate(lm, [prompt], 1)[0][0]
    candidates = [[*prompt, token] for token in range(50)]
    scores = sequence_nll(lm, candidates, [[-100] * 3 + c[3:] for c in candidates])
    assert min(range(50), key=lambda token: scores[token][0]) == chosen
    assert sum(math.exp(-nll) for nll, _ in scores) == pytest.approx(1)


def test_nothing_to_score():
    lm = model()
    assert sequence_nll(lm, [], []) == []
    assert sequence_nll(lm, [[1, 2]], [[1, -100]]) == [(0.0, 0)]
    assert sequence_nll(lm, [[], [5]], [[], [5]]) == [(0.0, 0)] * 2


def test_the_last_token_is_predicted_behind_a_full_model():
    lm = model().eval()
    sequence = [1] * 21
    ((nll, count),) = sequence_nll(lm, [sequence], [[-100] * 20 + [7]])
    assert (nll, count) == (pytest.approx(by_hand(lm, sequence, [-100] * 20 + [7])[0]), 1)


def test_bad_input_is_named():
    lm = model()
    with pytest.raises(ValueError, match="labels: got 1, expected 2 as in sequences"):
        sequence_nll(lm, [[1], [2]], [[1]])
    with pytest.raises(ValueError, match="labels: got 1 for sequence 1, expected one for each"):
        sequence_nll(lm, [[1], [2, 3]], [[1], [2]])
    with pytest.raises(ValueError, match="max_length 20"):
        sequence_nll(lm, [[1] * 22], [[1] * 22])
    with pytest.raises(ValueError, match="got classes from 60 to 60"):
        sequence_nll(lm, [[1, 2]], [[1, 60]])
