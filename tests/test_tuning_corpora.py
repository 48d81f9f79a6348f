"""The text that comes with Python, and files of the user's own."""

import json

import pytest

from fuseformer.tuning import corpora


def test_topics_are_all_of_pydoc_sorted():
    documents = corpora.topics()
    names = [document.source for document in documents]
    assert len(documents) > 60
    assert names == sorted(names)
    assert all(document.text for document in documents)


def test_standard_library_has_thousands_of_docstrings_and_no_tests():
    found = corpora.docstrings()
    assert len(found) > 4000
    modules = {item.module for item in found}
    assert "json.decoder" in modules
    assert not [m for m in modules if set(m.split(".")) & {"test", "tests", "site-packages"}]
    assert all(item.text == item.text.strip() for item in found)
    by_path = {item.path: item for item in found}
    assert by_path["shutil.copyfile"].signature.startswith("(src, dst")
    assert by_path["textwrap"].kind == "module"
    assert by_path["textwrap.TextWrapper"].kind == "class"


def test_docstrings_of_a_folder_skip_what_cannot_be_parsed(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('"""Text of a test suite, not wanted."""')
    (tmp_path / "old.py").write_text("print 'syntax of another age'")
    (tmp_path / "zero.py").write_bytes(b'"""Bytes with a null \x00 in them."""')
    (tmp_path / "latin.py").write_bytes(
        '# -*- coding: latin-1 -*-\n"""Größe of a text in Latin-1."""'.encode("latin-1")
    )
    (tmp_path / "b.py").write_text(
        '"""Short."""\nif True:\n    class K:\n        async def f(self, x: int = 3) -> int:\n'
        '            """First line here, please.\n\n            Indented."""\n'
    )
    found = corpora.docstrings(str(tmp_path))
    assert [(i.path, i.signature) for i in found] == [("b.K.f", "(self, x: int=3)"), ("latin", "")]
    assert found[0].text == "First line here, please.\n\nIndented."


def test_a_folder_without_docstrings_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no Python file with a docstring"):
        corpora.docstrings(str(tmp_path))


@pytest.mark.parametrize("language", sorted(corpora.LANGUAGES))
def test_language_packs_give_clean_pairs(language):
    pairs = corpora.translations(language)
    assert len(pairs) > 800
    assert len({pair.source for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert "\x04" not in pair.source + pair.target
        assert "%(" not in pair.source
        assert pair.source.strip()
        assert pair.target.strip()


def test_unknown_language_and_missing_pack_are_named(monkeypatch):
    with pytest.raises(ValueError, match="'xx'"):
        corpora.translations("xx")
    monkeypatch.setitem(corpora.LANGUAGES, "eo", ("Esperanto", "no_such_pack", "no-such-pack"))
    with pytest.raises(ValueError, match=r"no-such-pack.*fuseformer\[tune\]"):
        corpora.translations("eo")


def test_placeholders_become_one_sign():
    assert corpora.mask_placeholders("Save %(name)s to {path} as %1?") == "Save … to … as …?"
    assert corpora.mask_placeholders("100% of  it") == "100% of it"


def test_files_of_the_user(tmp_path):
    (tmp_path / "a.txt").write_text("  One document.\n")
    lines = [json.dumps({"text": "first"}), "", '{"text": "second\u2028still second"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    documents = corpora.read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [d.text for d in documents] == ["One document.", "first", "second\u2028still second"]


def test_a_byte_order_mark_and_other_line_ends_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo\rthree.".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "first"}\r\n{"text": "x"}\r\n'.encode())
    documents = corpora.read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [d.text for d in documents] == ["One\ntwo\nthree.", "first", "x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}]', "line 1: want an object, got list"),
        ("a.json", '{\n"text": "a"}', "line 1: not JSON"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}', "holds lines of JSON; name it .jsonl"),
        ("a.csv", "text\na", "plain text or lines of JSON, not .csv"),
        ("a.jsonl", '{"text": "a", "text": "b"}', 'line 1: field "text" comes twice'),
        ("a.jsonl", '{"text": "a", "by": {"x": 1, "x": 2}}', 'line 1: field "x" comes twice'),
    ],
)
def test_what_would_be_read_wrongly_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        corpora.read_documents([tmp_path / name])


def test_json_may_be_lines_of_objects(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "first", "id": 1}\n{"text": "second"}\n')
    documents = corpora.read_documents([tmp_path / "a.json"])
    assert [d.text for d in documents] == ["first", "second"]


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not UTF-8 text"):
        corpora.read_documents([tmp_path / "a.jsonl"])
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 text .*looks like UTF-16"):
        corpora.read_documents([tmp_path / "b.txt"])


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', "{}", '"text"'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2: "):
        corpora.read_documents([path])


def test_unreadable_and_empty_files_are_errors(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (
        ("binary", "not UTF-8"),
        ("empty", "no text"),
        ("absent", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            corpora.read_documents([tmp_path / f"{name}.txt"])
    with pytest.raises(ValueError, match="empty file list"):
        corpora.read_documents([])
