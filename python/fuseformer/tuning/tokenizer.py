"""A byte-level BPE vocabulary, trained on the run's own text."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>", "<sep>")
BYTES = 256


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
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Train a vocabulary of at most `vocab_size` tokens, of which 5 are special and 256 bytes.

        Raises `ValueError` for a smaller `vocab_size`, and where there is no text.
        """
        smallest = BYTES + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size: got {vocab_size}, want at least {smallest}")
        corpus = [text for text in texts if text]
        if not corpus:
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
        core.train_from_iterator(corpus, trainer)
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

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are left out."""
        return self._core.decode(list(ids), skip_special_tokens=True)
