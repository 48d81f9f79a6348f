"""Files that are there whole or not at all, whatever interrupts the program that writes them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` survive a power failure: what was renamed there stays renamed.

    Raises `OSError` where the folder cannot be opened.
    """
    if os.name == "nt":  # Windows opens no folders, and its file system journals renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file, and only then put it in the place of `path`.

    `write` gets a binary file next to `path`, named like it with ``.partial`` behind. A reader sees
    the previous file or the new one, never a part of it, and so does the next start after a crash.
    If anything raises, a full disk (`OSError`) or an interrupt included, the partial file is
    removed, what was at `path` stays, and the exception goes on. The folder must exist.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            # Before the rename: else a power failure may keep the new name and lose its content.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
