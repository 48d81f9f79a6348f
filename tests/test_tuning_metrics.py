"""Scores of answers, on cases whose value is known by hand."""

import math

import pytest

from fuseformer.tuning import metrics

SCORES = (
    metrics.exact_match,
    metrics.token_f1,
    metrics.accuracy,
    metrics.bleu,
    metrics.chrf,
    metrics.rouge_l,
)


@pytest.mark.parametrize("score", SCORES)
def test_a_perfect_answer_has_100_and_a_foreign_one_0(score):
    texts = ["Return the size of the file in bytes.", "Open a new window for the user."]
    assert score(texts, texts) == pytest.approx(100)
    assert score(["", ""], texts) == 0
    assert score(["@", "#"], texts) < 1  # chrF smooths


@pytest.mark.parametrize("score", SCORES)
def test_empty_lists_and_unequal_ones_are_errors(score):
    with pytest.raises(ValueError, match="references: got none"):
        score([], [])
    with pytest.raises(ValueError, match="predictions: got 1"):
        score(["a"], ["a", "b"])


def test_squad_normalisation():
    assert metrics.normalise_answer("The  file's Name, a.") == "files name"
    assert metrics.exact_match(["the cat!"], ["Cat"]) == 100
    assert metrics.exact_match(["theatre"], ["atre"]) == 0


def test_token_f1_by_hand():
    # 2 shared words of 3 and 4: precision 2/3, recall 2/4.
    assert metrics.token_f1(["red green blue"], ["red green two three"]) == pytest.approx(400 / 7)
    assert metrics.token_f1(["the"], ["a"]) == 100  # nothing is left of either
    assert metrics.token_f1(["the"], ["word"]) == 0
    assert metrics.token_f1(["x x x"], ["x y"]) == pytest.approx(40)


def test_rouge_l_by_hand():
    # The longest common subsequence of "a b c d" and "a c b d" has 3 of 4 words.
    assert metrics.rouge_l(["w1 w2 w3 w4"], ["w1 w3 w2 w4"]) == pytest.approx(75)


def test_bleu_splits_chinese_by_character():
    prediction, reference = ["打开新的终端窗口"], ["打开新的编辑窗口"]
    assert metrics.bleu(prediction, reference, "zh") > metrics.bleu(prediction, reference) == 0


def test_accuracy_and_perplexity():
    assert metrics.accuracy(["a", "b", "c", "d"], ["a", "b", "x", "y"]) == 50
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e9, 1) == math.inf
    assert math.isnan(metrics.perplexity(math.nan, 1))
    with pytest.raises(ValueError, match="tokens: got 0"):
        metrics.perplexity(1.0, 0)
