"""Scores of answers against references, each in percent except perplexity."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

# SQuAD's evaluation (Rajpurkar et al. 2016) drops these before it compares two answers.
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower-case a text and drop punctuation, English articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the percentage of predictions that equal their reference once normalised."""
    _check(predictions, references)
    return _percent(
        [
            normalise_answer(p) == normalise_answer(r)
            for p, r in zip(predictions, references, strict=True)
        ]
    )


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the words that prediction and reference share, in percent.

    Two answers that are both empty once normalised agree; an empty one and another do not.
    """
    _check(predictions, references)
    return _percent([_f1(p, r) for p, r in zip(predictions, references, strict=True)])


def _f1(prediction: str, reference: str) -> float:
    ours, theirs = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def accuracy(predictions: Sequence[object], references: Sequence[object]) -> float:
    """Return the percentage of predictions that equal their reference."""
    _check(predictions, references)
    return _percent([p == r for p, r in zip(predictions, references, strict=True)])


def bleu(predictions: Sequence[str], references: Sequence[str], language: str = "en") -> float:
    """Return corpus BLEU (Papineni et al. 2002) as sacrebleu computes it.

    Words are split as `language` needs: Chinese ("zh") by character.
    """
    _check(predictions, references)
    if not any(p.strip() for p in predictions):
        return 0.0
    import sacrebleu

    tokenize = "zh" if language == "zh" else "13a"
    return float(
        sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokenize).score
    )


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return chrF (Popovic 2015), which credits parts of words where BLEU sees none."""
    _check(predictions, references)
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure (Lin 2004) with stemming, in percent."""
    _check(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return _percent(
        [
            scorer.score(r, p)["rougeL"].fmeasure
            for p, r in zip(predictions, references, strict=True)
        ]
    )


def perplexity(summed_nll: float, tokens: int) -> float:
    """Return exp(mean negative log-likelihood); infinite where that overflows.

    `summed_nll` is in nats over `tokens` tokens. Raises `ValueError` without tokens.
    """
    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}, want at least 1")
    try:
        return math.exp(summed_nll / tokens)
    except OverflowError:
        return math.inf


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)


def _check(predictions: Sequence[object], references: Sequence[object]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions: got {len(predictions)}, want as many as references, {len(references)}"
        )
    if not references:
        raise ValueError("references: got none, want at least one")
