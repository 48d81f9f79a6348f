"""Scores of answers against references, each in percent except perplexity.

Texts are compared in Unicode's composed form, so that it does not matter how an accent was typed.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from fuseformer.tuning import scripts

# SQuAD's evaluation (Rajpurkar et al. 2016) drops these before it compares two answers.
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise_answer(text: str) -> str:
    """Drop case, punctuation of any script, English articles and repeated spaces.

    A text of nothing else keeps its signs: "+" is not "-".
    """
    plain = scripts.normal(text)
    kept = "".join(
        c for c in plain if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", kept).split()) or " ".join(plain.split())


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
    """Return the mean F1 of what prediction and reference share, in percent.

    That is words, or characters in scripts without spaces (`scripts.words`).
    """
    _check(predictions, references)
    return _percent([_f1(p, r) for p, r in zip(predictions, references, strict=True)])


def _f1(prediction: str, reference: str) -> float:
    ours, theirs = (scripts.words(normalise_answer(text)) for text in (prediction, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def accuracy(predictions: Sequence[object], references: Sequence[object]) -> float:
    """Return the percentage of predictions that equal their reference."""
    _check(predictions, references)
    return _percent([p == r for p, r in zip(predictions, references, strict=True)])


def bleu(
    predictions: Sequence[str], references: Sequence[str], tokenise: str = scripts.AUTO
) -> float:
    """Return corpus BLEU (Papineni et al. 2002) as sacrebleu computes it.

    `tokenise` is one of sacrebleu's tokenisers (`scripts.TOKENISERS`), or "auto": for each record
    the one that befits the script of its reference. Where all answers are too short for runs of
    four words, the longest runs that there are count (sacrebleu's effective order). Raises
    `ValueError` for another tokeniser.
    """
    _check(predictions, references)
    if not any(p.strip() for p in predictions):
        return 0.0
    from sacrebleu.metrics import BLEU

    names = _bleu_tokenisers(references, tokenise)
    ours, theirs = (
        [
            _bleu_tokeniser(n)(unicodedata.normalize("NFC", t))
            for n, t in zip(names, texts, strict=True)
        ]
        for texts in (predictions, references)
    )
    score = BLEU(tokenize="none", effective_order=True, force=True).corpus_score(ours, [theirs])
    return float(score.score)


def bleu_tokenisers(references: Sequence[str], tokenise: str = scripts.AUTO) -> str:
    """Say which of sacrebleu's tokenisers `bleu` takes for these references, and how often."""
    return scripts.counted(_bleu_tokenisers(references, tokenise))


def _bleu_tokenisers(references: Sequence[str], tokenise: str) -> list[str]:
    if tokenise == scripts.AUTO:
        return [scripts.tokeniser_for(reference) for reference in references]
    if tokenise not in scripts.TOKENISERS:
        wanted = ", ".join((scripts.AUTO, *scripts.TOKENISERS))
        raise ValueError(f"tokenise: got {tokenise!r}, want one of {wanted}")
    return [tokenise] * len(references)


@cache
def _bleu_tokeniser(name: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=name).tokenizer


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return chrF (Popovic 2015), which credits parts of words where BLEU sees none."""
    _check(predictions, references)
    import sacrebleu

    ours, theirs = (
        [unicodedata.normalize("NFC", text) for text in texts]
        for texts in (predictions, references)
    )
    return float(sacrebleu.corpus_chrf(ours, [theirs]).score)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure (Lin 2004), in percent.

    It counts words, English ones stemmed, or characters in scripts without spaces
    (`scripts.words`).
    """
    _check(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_StemmedWords())
    return _percent(
        [
            scorer.score(r, p)["rougeL"].fmeasure
            for p, r in zip(predictions, references, strict=True)
        ]
    )


class _StemmedWords:
    """What rouge-score asks to split a text: words, stemmed as its own tokeniser stems them."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return [
            self._stem(word) if len(word) > 3 and word.isascii() else word
            for word in scripts.words(text)
        ]


def word_tokenisers(references: Sequence[str]) -> str:
    """Say how ROUGE-L and F1 split these references: "words", "characters", or how many each."""
    return scripts.counted(
        "characters" if scripts.splits_characters(reference) else "words"
        for reference in references
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
