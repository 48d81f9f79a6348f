"""What a run has written into its folder, by name: it replaces and removes nothing else."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fuseformer.files import write_atomically
from fuseformer.models.checkpoint import CONFIG, WEIGHTS
from fuseformer.tuning.ownership import LOCK, OWNER

MANIFEST, RECIPE, LOG, CHECKPOINTS = "run.json", "recipe.toml", "metrics.jsonl", "checkpoints"
TOKENIZER, STATE_TENSORS, STATE_NUMBERS = "tokenizer.json", "training.safetensors", "training.json"
KIND = "fuseformer run"
_CHECKPOINT_FILES = (WEIGHTS, CONFIG, TOKENIZER, RECIPE, STATE_TENSORS, STATE_NUMBERS)
_PASSING = (".partial", ".replaced", ".removed")  # of a checkpoint that is written or removed


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, but for files in its folder that the run has not written."""
    for name in _CHECKPOINT_FILES:
        for path in (folder / name, folder / (name + ".partial")):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.rmdir()


class Manifest:
    """The file `run.json` of a run's folder, with the checkpoints that the run has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MANIFEST

    def exists(self) -> bool:
        """Return whether the folder has a manifest; raises `ValueError` for somebody else's."""
        return self._read() is not None

    def _read(self) -> list[str] | None:
        try:
            content: Any = json.loads(self.path.read_text(encoding="utf-8"))
            names = content["checkpoints"] if content["kind"] == KIND else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not the list of a run's files ({error})") from None
        if not isinstance(names, list) or not all(
            isinstance(n, str) and "/" not in n for n in names
        ):
            raise ValueError(f"{self.path}: not the list of a run's files")
        return names

    def names(self) -> list[str]:
        """Return the names of the checkpoints that the run has begun, oldest first.

        A run of before there were manifests has those whose names are a checkpoint's.
        """
        names = self._read()
        if names is None:
            found = (path.name for path in (self.folder / CHECKPOINTS).glob("step-*"))
            names = [name for name in found if len(name) == 13 and name[5:].isdigit()]
        return sorted(names)

    def write(self, names: list[str]) -> None:
        """Replace the list of checkpoints; raises `OSError` where the folder cannot be written."""
        text = json.dumps({"kind": KIND, "checkpoints": sorted(set(names))}, indent=1) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def foreign(self) -> list[str]:
        """Return the names of files in the folder that no run has put there."""
        if self.exists() or not self.folder.exists():
            return []
        ours = {LOCK, OWNER, MANIFEST + ".partial"}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in ours)

    def clear_leftovers(self) -> None:
        """Remove what a kill left of checkpoints that were being written or removed."""
        names = self.names()
        for name in names:
            for suffix in _PASSING:
                remove_checkpoint(self.folder / CHECKPOINTS / (name + suffix))
        there = [name for name in names if (self.folder / CHECKPOINTS / name).is_dir()]
        if there != self._read():
            self.write(there)

    def remove_run(self) -> None:
        """Remove what the run has written, and its folder where nothing else is in it."""
        for name in self.names():
            for suffix in ("", *_PASSING):
                remove_checkpoint(self.folder / CHECKPOINTS / (name + suffix))
        for name in (RECIPE, LOG, LOCK, OWNER, MANIFEST):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.folder / CHECKPOINTS, self.folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
