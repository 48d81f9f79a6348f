"""The vocabulary: exact both ways, for text that it has never seen."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseformer.tuning import corpora
from fuseformer.tuning.tokenizer import PIECE, SPECIAL_TOKENS, Tokenizer, pieces


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([page.text for page in corpora.topics()[:20]], vocab_size=800)


def test_a_text_comes_back_exactly(tokenizer):
    for text in (
        "",
        " ",
        "  two  spaces\n\n\ttab ",
        "naïve Größe 中文 🙂 \x00\x7f",
        "def f(x): return x",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


SMALL = Tokenizer.train(["the quick brown fox"] * 3, vocab_size=280)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    assert SMALL.decode(SMALL.encode(text)) == text


def test_special_tokens_have_fixed_ids_and_cannot_be_typed(tokenizer):
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    text = "an " + "".join(SPECIAL_TOKENS) + " end"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_training_is_repeatable_and_bounded(tokenizer):
    again = Tokenizer.train([page.text for page in corpora.topics()[:20]], vocab_size=800)
    text = corpora.topics()[30].text
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.vocab_size == 800
    assert max(tokenizer.encode(text)) < 800
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert tokenizer.encode_batch([text, "a"]) == [tokenizer.encode(text), tokenizer.encode("a")]


def test_saving_keeps_it(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    text = "Some text with <eos> inside, and more."
    assert loaded.encode(text) == tokenizer.encode(text)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_bad_files_are_named(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(path)
    for content in ("", "{}", "[1, 2"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
            Tokenizer.load(path)
    tokenizer.save(path)
    stored = json.loads(path.read_text())
    stored["added_tokens"] = []
    stored["model"]["vocab"] = {"a": 0, "b": 1}
    stored["model"]["merges"] = []
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="token 0 is not <pad>"):
        Tokenizer.load(path)


def test_bad_training_requests():
    with pytest.raises(ValueError, match="vocab_size: got 100, want at least 261"):
        Tokenizer.train(["text"], vocab_size=100)
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train(["", ""])


def test_a_long_text_is_encoded_in_pieces_to_the_same_tokens():
    text = "".join(f"line {i}, of many\n" + "\n  " * (i % 3) for i in range(20_000))
    made = list(pieces(text))
    assert "".join(made) == text
    assert len(made) > 4
    assert max(map(len, made)) <= PIECE
    tokenizer = Tokenizer.train([text], 300)
    texts = [text, "", "short"]
    assert [list(ids) for ids in tokenizer.encode_each(texts)] == tokenizer.encode_batch(texts)
    assert "".join(pieces("x" * 200_000)) == "x" * 200_000
    assert list(pieces("")) == [""]


def test_a_vocabulary_of_much_text_is_counted_from_a_share_of_it(monkeypatch):
    texts = [f"word{i % 7} of text {i % 11}" for i in range(4000)]
    monkeypatch.setattr("fuseformer.tuning.tokenizer.COUNTED", 20_000)
    one, two = (Tokenizer.train(texts, 300) for _ in range(2))
    assert one.encode("word3 of text 5") == two.encode("word3 of text 5")
    assert len(one.encode("word3 of text 5")) < 8
