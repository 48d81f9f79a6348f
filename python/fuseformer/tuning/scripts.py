"""How texts of any script are split into what a metric counts.

Scripts that put no space between words are split into characters, as is usual where no dictionary
is at hand; all others at the boundaries of Unicode's letters, marks and digits.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

#: Tokenisers of BLEU, of sacrebleu's those that need no other package and no download.
TOKENISERS = ("13a", "intl", "zh", "char")
AUTO = "auto"

_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"


@cache
def _patterns() -> tuple[Any, Any, Any]:
    import regex

    # A character of a script without spaces, an emoji with what modifies and joins it, a word.
    unit = regex.compile(
        rf"[{_NO_SPACES}]\p{{M}}*"
        r"|(?=[\p{Extended_Pictographic}\p{Regional_Indicator}])\X"
        rf"|[[\p{{L}}\p{{N}}\p{{M}}]--[{_NO_SPACES}]]+",
        regex.V1,
    )
    sign = regex.compile(r"\X")
    unspaced = regex.compile(rf"[{_NO_SPACES}--\p{{Han}}]", regex.V1)
    return unit, sign, unspaced


def normal(text: str) -> str:
    """Return the text in composed form and without case: what two equal texts have in common."""
    return unicodedata.normalize("NFC", text).casefold()


def words(text: str) -> list[str]:
    """Return the words and emoji of a text without case, characters for scripts without spaces.

    A text without any, such as punctuation, is split into the signs that a reader sees.
    """
    unit, sign, _ = _patterns()
    found = unit.findall(normal(text))
    return found or [cluster for cluster in sign.findall(normal(text)) if not cluster.isspace()]


def splits_characters(text: str) -> bool:
    """Say whether `words` splits any of the text into characters."""
    import regex

    return regex.search(rf"[{_NO_SPACES}]", text) is not None


def tokeniser_for(text: str) -> str:
    """Return the tokeniser of BLEU for a text: "zh" for Chinese, "char" for others unspaced."""
    if not splits_characters(text):
        return "13a"
    return "char" if _patterns()[2].search(text) else "zh"


def counted(names: Iterable[str]) -> str:
    """Return which names come how often, as text: "zh", or "13a: 3, zh: 40"."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
