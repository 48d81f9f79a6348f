"""A byte-level BPE vocabulary, trained on the run's own text."""

import os
import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fuseformer.tuning.progress import followed

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>", "<sep>")
BYTES = 256

#: Characters of a text, and of texts together, that the library is given at a time: it needs a
#: hundred bytes a token meanwhile.
PIECE = 65_536
AT_ONCE = 4 * PIECE


#: Characters, and texts, that a vocabulary is counted from at most, drawn from all: what comes
#: often in a corpus comes often in these, and memory goes with the number of different words.
COUNTED = 4_000_000
COUNTED_TEXTS = 100_000


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about `PIECE` characters, cut where a single line ends.

    There the tokens are those of the whole text; a text without such places is cut within lines.
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        place = text.rfind("\n", start + PIECE // 2, end - 1)
        while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
            place = text.rfind("\n", start + PIECE // 2, place)
        end = place + 1 if place > 0 else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text


class Tokenizer:
    """Text to token ids and back, every text exactly: `decode(encode(text)) == text`.

    The special tokens have ids 0 to 4 in the order of `SPECIAL_TOKENS`. Their names inside a text
    are ordinary characters, so that no document can end a sequence.
    """

    pad_id, bos_id, eos_id, mask_id, sep_id = range(len(SPECIAL_TOKENS))

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        for index, token in enumerate(SPECIAL_TOKENS):
            if core.token_to_id(token) != index:
                raise ValueError(
                    f"tokenizer: token {index} is not {token}: made by another program"
                )
        core.encode_special_tokens = True
        self._core = core

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int = 4096) -> "Tokenizer":
        """Train a vocabulary of at most `vocab_size` tokens, of which 5 are special and 256 bytes.

        Of more than `COUNTED` characters or `COUNTED_TEXTS` texts, a share is drawn, always the
        same.
        Raises `ValueError` for a smaller `vocab_size`, and where there is no text.
        """
        smallest = BYTES + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size: got {vocab_size}, want at least {smallest}")
        if not any(texts):
            raise ValueError("texts: no text to train a tokenizer on")
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        share = min(COUNTED / max(1, sum(map(len, texts))), COUNTED_TEXTS / len(texts))
        draw = random.Random(0)
        core.train_from_iterator(
            (
                piece
                for text in followed(texts, "counting words", "text")
                for piece in pieces(text)
                if share >= 1 or draw.random() < share
            ),
            trainer,
        )
        return cls(core)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a `tokenizer.json`; raises `ValueError` for a missing, damaged or foreign file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer {path}: cannot be read ({error})") from None
        try:
            core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises the base class itself
            raise ValueError(f"tokenizer {path}: not a tokenizer.json ({error})") from None
        return cls(core)

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` whole or not at all."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(self._core.to_str(pretty=False))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)

    @property
    def vocab_size(self) -> int:
        """The number of token ids, special ones included."""
        return self._core.get_vocab_size()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of the special tokens."""
        return tuple(range(len(SPECIAL_TOKENS)))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens.

        Raises `ValueError` for a text with half a surrogate pair, which UTF-8 cannot hold.
        """
        text.encode()
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, in parallel where the machine allows."""
        return [e.ids for e in self._core.encode_batch(list(texts), add_special_tokens=False)]

    def encode_each(self, texts: Sequence[str]) -> Iterator["array[int]"]:
        """Yield the token ids of each text, many at once but never all, while a bar shows."""
        group: list[str] = []
        size = 0
        for text in followed(texts, "tokenising", "text"):
            if len(text) > PIECE:
                yield from map(_flat, self.encode_batch(group))
                group, size = [], 0
                ids = array("i")
                for piece in pieces(text):
                    ids.extend(self.encode(piece))
                yield ids
                continue
            group.append(text)
            size += len(text) + 1
            if size > AT_ONCE:
                yield from map(_flat, self.encode_batch(group))
                group, size = [], 0
        yield from map(_flat, self.encode_batch(group))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are left out."""
        return self._core.decode(list(ids), skip_special_tokens=True)


def _flat(ids: list[int]) -> "array[int]":
    return array("i", ids)
