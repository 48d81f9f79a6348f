"""Text that every machine has: Python's own documentation, its docstrings, and language packs.

Nothing is downloaded and no text lives in the repository. The order of every list is a function of
the installation alone, so that two runs on one machine see the same data.
"""

import ast
import html
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from fuseformer.tuning.readers import json_object, read_lines, read_text

LANGUAGES = {
    "fr": ("French", "jupyterlab_language_pack_fr_FR", "jupyterlab-language-pack-fr-FR"),
    "de": ("German", "jupyterlab_language_pack_de_DE", "jupyterlab-language-pack-de-DE"),
    "zh": ("Chinese", "jupyterlab_language_pack_zh_CN", "jupyterlab-language-pack-zh-CN"),
}
PLACEHOLDER = "…"

# Test suites repeat each other's text, and third-party packages differ from machine to machine.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "lib2to3",  # gone since 3.13
    "turtledemo",
}
_PLACEHOLDERS = re.compile(
    r"%\(\w+\)[sdrif]|%\d+|%[sdrif]\b|\{\{[^{}]*\}\}|\$?\{[^{}]*\}|<[^<>]+>|\$\d"
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text to model and where it comes from; documents of one `group` say the same."""

    source: str
    text: str
    group: str = ""


@dataclass(frozen=True)
class Docstring:
    """A docstring: the module it is in, the qualified name and signature of its owner, its text.

    `name` is empty for a module's own docstring; `kind` is "module", "class" or "function".
    """

    module: str
    name: str
    kind: str
    signature: str
    text: str

    @property
    def path(self) -> str:
        """The dotted name a reader would look up."""
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Pair:
    """A string and its translation, placeholders masked in both."""

    source: str
    target: str
    language: str


def topics() -> list[Document]:
    """Return the topics of Python's built-in help, sorted by name.

    Raises `ValueError` where the installation was stripped of `pydoc_data`.
    """
    if find_spec("pydoc_data") is None or find_spec("pydoc_data.topics") is None:
        raise ValueError(
            "topics: this Python installation has no pydoc_data.topics; install the full "
            "standard library or name text files of your own"
        )
    table: dict[str, str] = import_module("pydoc_data.topics").topics
    return [Document(f"topic:{name}", table[name].strip()) for name in sorted(table)]


@lru_cache(maxsize=4)
def docstrings(root: str | None = None, minimum_words: int = 4) -> tuple[Docstring, ...]:
    """Return the docstrings of the Python files under `root` (default: the standard library).

    Sorted by file and position. Test suites, installed packages and docstrings of fewer than
    `minimum_words` words are left out; a file that this Python cannot parse is left out too,
    because some installations ship templates and old syntax. Raises `ValueError` when nothing is
    found.
    """
    base = Path(root if root is not None else sysconfig.get_path("stdlib"))
    found: list[Docstring] = []
    for path in sorted(base.rglob("*.py"), key=lambda path: path.relative_to(base).parts):
        parts = path.relative_to(base).parts
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in parts[:-1]):
            continue
        found.extend(
            item for item in _of_file(path, parts) if len(item.text.split()) >= minimum_words
        )
    if not found:
        raise ValueError(f"docstrings: no Python file with a docstring under {base}")
    return tuple(found)


def _of_file(path: Path, parts: tuple[str, ...]) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    module = ".".join([*parts[:-1], parts[-1][:-3]]).removesuffix(".__init__")
    yield from _of_node(tree, module, "")


def _of_node(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    kinds = {ast.Module: "module", ast.ClassDef: "class"}
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            signature = ""
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                signature = f"({ast.unparse(node.args)})"
            kind = kinds.get(type(node), "function")
            yield Docstring(module, name, kind, signature, inspect.cleandoc(text).strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _of_node(child, module, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.For)):
            yield from _of_node(child, module, name)


def mask_placeholders(text: str) -> str:
    """Replace what a program would fill in (`%(x)s`, `{}`, `%1`, `<tag>`) by one sign."""
    return " ".join(_PLACEHOLDERS.sub(PLACEHOLDER, html.unescape(text)).split())


@lru_cache(maxsize=4)
def translations(language: str = "fr") -> tuple[Pair, ...]:
    """Return the string pairs of a language pack: English to `language` ("fr", "de" or "zh").

    Context prefixes are stripped, placeholders masked, untranslated strings and repetitions of a
    source dropped (the first in file order stays). Raises `ValueError` for an unknown language, and
    naming the extra to install where the pack is missing.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language: got {language!r}, want one of {sorted(LANGUAGES)}")
    _, module, package = LANGUAGES[language]
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"language: {language!r} needs the package {package}; "
            'install it with: pip install "fuseformer[tune]"'
        )
    pairs: dict[str, Pair] = {}
    for folder in sorted(spec.submodule_search_locations):
        for path in sorted(Path(folder).rglob("*.json")):
            for source, target in _catalogue(path):
                if source != target and len(source) > 1 and len(target) > 1:
                    pairs.setdefault(source, Pair(source, target, language))
    if not pairs:
        raise ValueError(f"language: the package {package} holds no translated strings")
    return tuple(pairs.values())


def _catalogue(path: Path) -> Iterator[tuple[str, str]]:
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        return
    for key in sorted(entries):
        values = entries[key]
        # The empty key holds the catalogue's own headers.
        if key and isinstance(values, list) and values and isinstance(values[0], str):
            source = mask_placeholders(key.rsplit("\x04", 1)[-1])
            target = mask_placeholders(values[0])
            if source and target:
                yield source, target


#: Suffixes of files that hold a line of JSON a document.
JSON_LINES = (".jsonl", ".ndjson", ".json")
#: Suffixes of files whose bytes are no text to learn, however well they decode.
_NO_TEXT = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """Read a user's corpus: plain text (one document a file) or JSONL (`{"text": ...}` a line).

    Raises `ValueError` naming the file, and the line of a JSONL file, for what cannot be read, and
    for a corpus without any text.
    """
    return list(documents_of(paths))


def documents_of(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Yield what `read_documents` returns, a document at a time."""
    names = [Path(path) for path in paths]
    empty = True
    for path in names:
        for document in _documents_of_file(path):
            if document.text:
                empty = False
                yield document
    if empty:
        raise ValueError(f"corpus: no text in {', '.join(map(str, names)) or 'an empty file list'}")


def _documents_of_file(path: Path) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in _NO_TEXT:
        raise ValueError(
            f"{path}: a corpus is plain text or lines of JSON, not {suffix}; convert it to .jsonl"
        )
    if suffix in JSON_LINES:
        for number, line in read_lines(path):
            yield Document(f"{path}:{number}", _text_of_line(line, f"{path}, line {number}"))
        return
    text = read_text(path).strip()
    if text.startswith("{") and _is_line_of_corpus(text.split("\n", 1)[0]):
        raise ValueError(f"{path}: holds lines of JSON; name it .jsonl to have its texts read")
    yield Document(str(path), text)


def _is_line_of_corpus(line: str) -> bool:
    try:
        _text_of_line(line, "")
    except ValueError:
        return False
    return True


def is_text(text: str) -> bool:
    """Say whether a string can be written as UTF-8: JSON's escapes may make half a character."""
    if text.isascii():
        return True
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _text_of_line(line: str, where: str) -> str:
    text = json_object(line, where).get("text")
    if not isinstance(text, str):
        raise ValueError(f'{where}: want an object with a string "text"')
    text = text.strip()
    if not is_text(text):
        raise ValueError(f"{where}: half a surrogate pair, want Unicode text")
    return text
