"""Reading a user's text files: UTF-8, line by line, each fault named by file and line."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fuseformer.tuning.progress import progress

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded(raw: bytes, where: str) -> str:
    """Return bytes as text without a byte order mark in front; raises `ValueError` at `where`."""
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16, save it as UTF-8" if raw.startswith(_UTF_16) else ""
        raise ValueError(f"{where}: not UTF-8 text ({error.reason}{hint})") from None


def read_text(path: str | Path) -> str:
    """Return a file's text, lines ended by "\\n" and no byte order mark.

    Raises `ValueError` naming the file where it cannot be read or is not UTF-8.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\r" in raw:
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return decoded(raw, str(path))


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, with their numbers, while a bar shows.

    Lines end at a line feed alone, because JSON strings may hold U+2028 and its like. Raises
    `ValueError` naming the file, and the line that is not UTF-8.
    """
    name = Path(path).name
    try:
        with (
            open(path, "rb") as file,
            progress(os.fstat(file.fileno()).st_size or None, f"reading {name}", "B") as bar,
        ):
            for number, raw in enumerate(file, 1):
                bar.update(len(raw))
                if number == 1:
                    line = decoded(raw, f"{path}, line 1")
                else:  # a byte order mark is one at the beginning only
                    try:
                        line = raw.decode("utf-8")
                    except UnicodeDecodeError as error:
                        reason = f"not UTF-8 text ({error.reason})"
                        raise ValueError(f"{path}, line {number}: {reason}") from None
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class _DuplicateKeyError(ValueError):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f'field "{twice}" comes twice')
    return found


def json_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object on a line; raises `ValueError`, which begins with `where`.

    Also for a key that comes twice, of which JSON's readers take the last in silence.
    """
    try:
        found = json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except _DuplicateKeyError as error:
        raise ValueError(f"{where}: {error}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: want an object, got {type(found).__name__}")
    return found


def check_readable(field: str, paths: Iterable[str | Path]) -> None:
    """Raise `ValueError` for a file that is not there, before anything long begins.

    Files are not opened: a pipe can be read once.
    """
    for path in paths:
        try:
            os.stat(path)
        except OSError as error:
            raise ValueError(f"{field}: {path}: cannot be read ({error.strerror})") from None
        if os.path.isdir(path):
            raise ValueError(f"{field}: {path}: cannot be read (it is a folder)")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{field}: {path}: cannot be read (Permission denied)")
