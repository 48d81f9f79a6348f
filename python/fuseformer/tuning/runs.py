"""The folder of a run: its recipe, its log, and checkpoints that are whole or not there.

::

    run.json                        which of the files here are the run's (`manifest`)
    recipe.toml                     what was asked for
    metrics.jsonl                   one line a step
    checkpoints/step-00000200/      a model (`models.checkpoint`), its tokenizer, and the state of
                                    optimizer, data order and random generators

A checkpoint is written under another name and renamed when every byte of it is on the disk. Files
that the run has not written stay as they are.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuseformer.files import sync_folder, write_atomically
from fuseformer.models.checkpoint import load_model, read_tensors, save_model, serialized
from fuseformer.models.language_model import TokenModel
from fuseformer.tuning.manifest import (
    CHECKPOINTS,
    LOG,
    RECIPE,
    STATE_NUMBERS,
    STATE_TENSORS,
    TOKENIZER,
    Manifest,
    remove_checkpoint,
)
from fuseformer.tuning.recipe import Recipe, read_recipe
from fuseformer.tuning.tokenizer import Tokenizer


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or read back as what it claims to be."""


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": value.cpu().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put AdamW's state back; raises `ValueError` where it is not that of these parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if set(state) != set(range(len(parameters))):
        raise ValueError(f"the state of {len(state)} parameters, the model has {len(parameters)}")
    for index, parameter in enumerate(parameters):
        moments = [state[index].get(name) for name in ("exp_avg", "exp_avg_sq")]
        if any(m is None or m.shape != parameter.shape for m in moments):
            raise ValueError(f"the state of parameter {index} is not of shape {parameter.shape}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


class Run:
    """A folder that holds a run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.log = self.folder / LOG
        self.manifest = Manifest(self.folder)

    def check_unused(self) -> None:
        """Raise `ValueError` where the folder holds a run already, or anything else."""
        if self.checkpoints():
            raise ValueError(
                f"output: {self.folder} holds a run already; pass --resume to go on with it, or "
                "name another folder"
            )
        foreign = self.manifest.foreign()
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ValueError(
                f"output: {self.folder} holds {', '.join(foreign[:3])}{more}, which no run has "
                "written; name a folder that is new or empty"
            )

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe.

        What a run without a checkpoint left there is overwritten. Raises `ValueError` where the
        folder holds a run already, or anything else.
        """
        self.check_unused()
        (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self.manifest.clear_leftovers()
        self.log.unlink(missing_ok=True)
        self.write_recipe(recipe)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the recipe, its files named so that they are found from any folder."""
        text = recipe.with_absolute_paths().to_toml().encode()
        write_atomically(self.folder / RECIPE, lambda file: file.write(text))

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was made with; raises `ValueError` where it cannot be read."""
        return read_recipe(self.folder / RECIPE)[0]

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints of the run, oldest first."""
        paths = (self.folder / CHECKPOINTS / name for name in self.manifest.names())
        return [path for path in paths if path.is_dir()]

    def latest(self) -> Path:
        """Return the newest checkpoint; raises `ValueError` where there is none."""
        found = self.checkpoints()
        if not found:
            raise ValueError(f"{self.folder}: no checkpoint of a run here")
        return found[-1]

    def save(
        self,
        step: int,
        model: Any,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        numbers: dict[str, Any],
        keep: int,
    ) -> Path:
        """Write a checkpoint and remove all but the `keep` newest; return where it is.

        Raises `CheckpointError` where it cannot be written; the older ones are intact then.
        """
        target = self.folder / CHECKPOINTS / f"step-{step:08d}"
        partial = target.with_suffix(".partial")
        tensors = _optimizer_tensors(optimizer) | _random_states()
        numbers = {"step": step, **numbers}
        names = self.manifest.names()
        if target.exists() and target.name not in names:
            raise CheckpointError(
                f"{target}: is there already, and not from this run; move it to another place, and "
                "go on with --resume"
            )
        try:
            self.manifest.clear_leftovers()
            # Named first: whatever a kill leaves of it is known to be the run's.
            self.manifest.write([*names, target.name])
            partial.mkdir(parents=True)
            save_model(model, partial)
            tokenizer.save(partial / TOKENIZER)
            # A copy elsewhere says itself what it learned from and is to be judged by.
            recipe = (self.folder / RECIPE).read_bytes()
            write_atomically(partial / RECIPE, lambda file: file.write(recipe))
            content = serialized(tensors)
            write_atomically(partial / STATE_TENSORS, lambda file: file.write(content))
            text = json.dumps(numbers).encode()
            write_atomically(partial / STATE_NUMBERS, lambda file: file.write(text))
            if target.exists():  # the run was resumed from an older one and came here again
                target.rename(target.with_suffix(".replaced"))
            partial.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            remove_checkpoint(partial)
            last = self.checkpoints()
            kept = f"the last good checkpoint is {last[-1]}" if last else "there is none before it"
            raise CheckpointError(
                f"{target}: the checkpoint cannot be written ({error.strerror or error}); {kept}"
            ) from None
        # Renamed first: a folder that is half removed must not count as a checkpoint.
        for old in self.checkpoints()[:-keep]:
            old.rename(old.with_suffix(".removed"))
        self.manifest.clear_leftovers()
        return target

    def restore(self, checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put back the optimizer's and the random generators' state; return the numbers saved.

        Raises `CheckpointError` for files that are missing, damaged, or of another model.
        """
        numbers = _read_numbers(checkpoint)
        path = checkpoint / STATE_TENSORS
        try:
            tensors = read_tensors(path)
            random = {k: tensors.pop(k) for k in list(tensors) if k.startswith("random.")}
            if numbers["step"] > 0:  # before the first step there is no state
                _restore_optimizer(optimizer, tensors)
            torch.set_rng_state(random["random.cpu"])
            if torch.cuda.is_available() and "random.cuda" in random:
                torch.cuda.set_rng_state(random["random.cuda"])
        except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not the training state of this run ({error}); remove the folder to go on "
                "from the checkpoint before it"
            ) from None
        return numbers

    def write_log(self, lines: list[dict[str, Any]]) -> None:
        """Append steps to the log; raises `CheckpointError` where it cannot be written."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            last = self.checkpoints()
            raise CheckpointError(
                f"{self.log}: cannot be written ({error.strerror or error}); the last good "
                f"checkpoint is {last[-1] if last else 'none yet'}"
            ) from None

    def read_log(self) -> list[dict[str, Any]]:
        """Return the logged steps; a last line that a kill cut short is left out."""
        if not self.log.exists():
            return []
        try:
            return list(_complete_lines(self.log.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"{self.log}: not a log of steps ({error})") from None

    def rewind_log(self, step: int) -> None:
        """Drop the logged steps after `step`: a resumed run does them again."""
        lines = [line for line in self.read_log() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        write_atomically(self.log, lambda file: file.write(text))


def _complete_lines(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n")[:-1], 1):
        entry = json.loads(line)
        if not isinstance(entry, dict) or not {"step", "loss"} <= set(entry):
            raise ValueError(f"line {number} has no step and loss")
        yield entry


def _read_numbers(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE_NUMBERS
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(numbers, dict) or set(numbers) != {"step", "tokens", "data", "sampler"}:
        raise CheckpointError(f"{path}: not the training state of a run")
    return numbers


def load_tuned(path: str | Path, device: str = "cpu") -> tuple[TokenModel, Tokenizer, Path]:
    """Return the model and tokenizer of a checkpoint, or of the newest in a run, and its folder.

    Raises `ValueError` naming the file for a folder that holds neither, and for damaged or foreign
    files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected a run or a checkpoint")
    if (folder / CHECKPOINTS).is_dir():
        folder = Run(folder).latest()
    model = load_model(folder, device)
    if not isinstance(model, TokenModel):
        raise ValueError(f"{folder}: holds a {type(model).__name__}, expected a language model")
    return model, Tokenizer.load(folder / TOKENIZER), folder
