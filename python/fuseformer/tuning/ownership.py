"""One owner a run: a second process that would train in the same folder is told who does."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, OWNER = ".lock", ".owner"


def check_single_process() -> None:
    """Raise `ValueError` under a launcher that started several processes of this command.

    Each would train a model of its own, and all but one of them for nothing.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise ValueError(
            f"WORLD_SIZE: got {count}, but this command trains in one process; start it by itself, "
            "without torchrun or accelerate launch"
        )


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if need be, for this process alone.

    The operating system lets go of it when the process ends, killed or not. A folder that was made
    here and has stayed empty is removed again. Raises `ValueError` that names the process, machine
    and time where somebody else holds it, and `OSError` where the folder cannot be made.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output: {folder} is in use by {_owner(folder)}; wait for it to end, or name another "
            "folder"
        ) from None
    try:
        (folder / OWNER).write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "host": platform.node(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                }
            ),
            encoding="utf-8",
        )
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        with suppress(PermissionError):  # Windows keeps what is open
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet
