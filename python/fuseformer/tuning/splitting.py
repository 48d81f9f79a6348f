"""Held-out items that training has not seen: grouping of near duplicates and removal of overlaps.

Documentation repeats itself. Methods inherit docstrings, wrappers copy them, help topics quote
them. A split by item would measure memory, so items are first joined into groups that share text,
groups are divided by a hash, and what still shares a run of words with a held-out item leaves
training.
"""

import hashlib
import re
from collections.abc import Hashable, Iterable, Sequence

OVERLAP_WORDS = 8

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation, underscores and white space."""
    return _WORD.findall(text.lower())


def normalised(text: str) -> str:
    """Return the text as its words, the form in which two texts are compared."""
    return " ".join(words(text))


def ngrams(text: str, n: int = OVERLAP_WORDS) -> set[str]:
    """Return the runs of `n` words in a text; empty where the text is shorter."""
    sequence = words(text)
    return {" ".join(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}


def group_by_shared_keys(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Return a group number for each item, the same for items linked by a chain of shared keys.

    The number of a group is the index of its first item.
    """
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first_with: dict[Hashable, int] = {}
    for item, own in enumerate(keys):
        for key in own:
            a, b = root(item), root(first_with.setdefault(key, item))
            parent[max(a, b)] = min(a, b)
    return [root(item) for item in range(len(keys))]


def stable_hash(text: str, seed: int = 0) -> int:
    """Return 64 bits that depend on the text and the seed alone, not on the process."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x00{text}".encode()).digest()[:8], "big")


def is_held_out(group: str, fraction: float, seed: int = 0) -> bool:
    """Say whether a group of items is held out; `fraction` of all groups are."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, want 0 <= fraction < 1")
    return stable_hash(group, seed) < fraction * 2**64


class HeldOutText:
    """The texts held out, to ask whether another text gives one of them away.

    `texts` are compared by runs of `n` words, and whole where they are shorter than that; `n` of
    8 words is long enough that phrases every manual uses do not count.
    """

    def __init__(self, texts: Iterable[str], n: int = OVERLAP_WORDS) -> None:
        self.n = n
        self._runs: set[str] = set()
        self._whole: set[str] = set()
        for text in texts:
            self._runs |= ngrams(text, n)
            self._whole.add(normalised(text))
        self._whole.discard("")

    def leaks_into(self, text: str) -> bool:
        """Say whether `text` is a held-out text or shares a run of `n` words with one."""
        return normalised(text) in self._whole or not self._runs.isdisjoint(ngrams(text, self.n))

    def without_leaks(self, text: str) -> str:
        """Return `text` without the paragraphs that leak, and empty if it leaks all the same."""
        kept = [part for part in re.split(r"\n\s*\n", text) if not self.leaks_into(part)]
        clean = "\n\n".join(kept)
        # A run of words may cross from one paragraph to the next.
        return "" if self.leaks_into(clean) else clean
