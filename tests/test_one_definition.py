"""Everything in ``csrc`` is defined once, whichever sources are linked into one library."""

import shutil

import pytest
from emulator_build import SOURCES, link_all_families
from one_definition import second_in_headers, second_in_sources, second_types

HOST = ("attention/decode.cpp", "feed_forward/linear.cpp")
HEADERS = ("attention/checks.h", "feed_forward/checks.h")
#: What is planted after the namespace opens, in the first and the second file.
FUNCTIONS = (
    "inline int twice() { return 1; }\nint first() { return twice(); }",
    "inline int twice() { return 2; }\nint second() { return twice(); }",
)
TYPES = (
    "struct Twice { int at; };\nint first(const Twice& x) { return x.at; }",
    "struct Twice { float at; };\nint second(const Twice& x) { return x.at > 0.0f; }",
)
NOT_INLINE = ("int twice() { return 1; }", "int twice() { return 1; }")


def planted(folder, files, texts):
    """Return a copy of the sources with a text in each of two files."""
    copy = folder / "csrc"
    shutil.copytree(SOURCES, copy)
    for name, text in zip(files, texts, strict=True):
        source = (copy / name).read_text()
        opened = "namespace fuseformer {\n"
        assert opened in source, f"{name} has changed: plant the bug anew"
        (copy / name).write_text(source.replace(opened, f"{opened}{text}\n", 1))
    return copy


def test_headers_define_everything_once():
    assert second_in_headers() == ""


def test_sources_define_every_function_once():
    assert second_in_sources() == []


def test_sources_define_every_type_once():
    assert second_types() == ""


def test_all_families_link_into_one_library():
    assert link_all_families().exists()


@pytest.mark.parametrize("which", [FUNCTIONS, TYPES], ids=["function", "type"])
def test_a_second_definition_in_a_header_is_seen(which, tmp_path):
    assert "redefinition of" in second_in_headers(planted(tmp_path, HEADERS, which))


def test_a_second_body_of_an_inline_function_is_seen(tmp_path):
    (seen,) = second_in_sources(planted(tmp_path, HOST, FUNCTIONS))
    assert seen.startswith("fuseformer::twice(): ")
    assert all(name in seen for name in HOST)


def test_a_second_body_of_a_type_is_seen(tmp_path):
    assert "Twice" in second_types(planted(tmp_path, HOST, TYPES))


def test_a_second_function_that_is_not_inline_is_seen(tmp_path):
    with pytest.raises(RuntimeError, match=r"multiple definition of .*twice"):
        link_all_families(planted(tmp_path, HOST, NOT_INLINE))
