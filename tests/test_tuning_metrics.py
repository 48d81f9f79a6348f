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
    assert metrics.token_f1(["the"], ["a"]) == 0  # nothing else is left of either
    assert metrics.token_f1(["the"], ["word"]) == 0
    assert metrics.token_f1(["x x x"], ["x y"]) == pytest.approx(40)


def test_rouge_l_by_hand():
    # The longest common subsequence of "a b c d" and "a c b d" has 3 of 4 words.
    assert metrics.rouge_l(["w1 w2 w3 w4"], ["w1 w3 w2 w4"]) == pytest.approx(75)


SCRIPTS = {
    "今天天气很好": ("zh", "characters"),
    "打开新的 JupyterLab 终端": ("zh", "characters"),
    "これは日本語の文です": ("char", "characters"),
    "สวัสดีครับ": ("char", "characters"),
    "Сегодня хорошая погода": ("13a", "words"),
    "오늘 날씨가 좋습니다": ("13a", "words"),
    "صباح الخير يا صديقي": ("13a", "words"),
    "सुप्रभात मेरे दोस्त": ("13a", "words"),
    "élève": ("13a", "words"),
    "🙂🙃👍🏽": ("13a", "words"),
    "?!": ("13a", "words"),
    "+": ("13a", "words"),
    "the": ("13a", "words"),
    "Ouvrir": ("13a", "words"),
}


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("score", SCORES)
def test_an_identical_text_of_any_script_has_100(text, score):
    assert score([text], [text]) == pytest.approx(100)


@pytest.mark.parametrize("text", SCRIPTS)
def test_texts_are_split_as_their_script_asks_and_it_is_said(text):
    bleu, words = SCRIPTS[text]
    assert metrics.bleu_tokenisers([text]) == bleu
    assert metrics.word_tokenisers([text]) == words


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("l ve", "élève"), ("+", "-"), ("the", "a"), ("🙂", "🙃"), ("погода", "город"), ("天", "地")],
)
def test_what_is_not_the_same_word_scores_nothing(prediction, reference):
    for score in (metrics.rouge_l, metrics.token_f1, metrics.exact_match, metrics.bleu):
        assert score([prediction], [reference]) == 0


def test_part_of_a_text_without_spaces_scores_in_part():
    for score in (metrics.rouge_l, metrics.token_f1):
        assert score(["天气好"], ["天气很好"]) == pytest.approx(600 / 7)
    assert 0 < metrics.bleu(["打开新的终端窗口"], ["打开新的编辑窗口"]) < 100
    assert metrics.bleu(["打开新的终端窗口"], ["打开新的编辑窗口"], "13a") == 0
    with pytest.raises(ValueError, match="tokenise: got 'mecab', want one of auto"):
        metrics.bleu(["a"], ["a"], "mecab")


def test_accents_may_be_typed_in_two_ways_and_punctuation_of_any_script_is_dropped():
    for score in SCORES[:2] + SCORES[3:]:
        assert score(["e\u0301le\u0300ve"], ["élève"]) == pytest.approx(100)
    assert metrics.exact_match(["答案。"], ["答案"]) == 100
    assert metrics.exact_match(["« élève »"], ["élève"]) == 100
    assert metrics.exact_match(["STRASSE"], ["Straße"]) == 100


def test_english_scores_as_sacrebleu_and_rouge_score_have_it():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    ours = ["The cats were sitting, quietly, on the mat's edge_line.", "It costs 3.14 dollars."]
    theirs = ["The cat sat quietly on the mat's edge_line!", "It had cost 3.14 dollars, say they."]
    assert metrics.bleu(ours, theirs) == pytest.approx(corpus_bleu(ours, [theirs]).score)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(theirs, ours, strict=True)]
    assert metrics.rouge_l(ours, theirs) == pytest.approx(50 * sum(scores))


def test_accuracy_and_perplexity():
    assert metrics.accuracy(["a", "b", "c", "d"], ["a", "b", "x", "y"]) == 50
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e9, 1) == math.inf
    assert math.isnan(metrics.perplexity(math.nan, 1))
    with pytest.raises(ValueError, match="tokens: got 0"):
        metrics.perplexity(1.0, 0)
