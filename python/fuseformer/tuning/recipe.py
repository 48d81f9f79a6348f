"""What a training run is made of: one flat list of fields, from TOML and from flags.

A recipe is written next to the run it made, so that resuming and reading back need no memory.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fuseformer.models.config import ModelConfig
from fuseformer.reference import ACTIVATIONS
from fuseformer.tuning.batches import MASKED_SHARE
from fuseformer.tuning.corpora import LANGUAGES
from fuseformer.tuning.readers import read_text
from fuseformer.tuning.tasks import DEFAULT_TASKS, TASKS

OBJECTIVES = ("causal", "masked", "seq2seq")
DTYPES = ("float32", "bfloat16")
WEIGHTINGS = ("token", "root", "record")
TRUNCATIONS = ("error", "input")
#: Fields that name files. A relative name in a TOML file counts from that file's folder, one on the
#: command line from where the command runs; a run keeps absolute ones.
PATHS = ("corpus", "records", "held_out")
#: Fields that may change when a run is resumed: what is learned from, and in which order, stays.
RESUMABLE = ("learning_rate", "clip_norm", "save_every", "keep", "device")


def _field(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training run; each is checked when the recipe is made.

    The sizes of the model are those of `ModelConfig`; they are read from the checkpoint instead
    where training starts from one. Raises `ValueError` that names the field, what it got and what
    it wants.
    """

    objective: str = _field("causal", "what is learned", OBJECTIVES)
    vocab_size: int = _field(4096, "tokens of a new vocabulary, at most")
    width: int = _field(256, "model width")
    heads: int = _field(4, "attention heads")
    layers: int = _field(4, "blocks; in the encoder and in the decoder each")
    hidden: int = _field(1024, "width of the feed-forward part")
    max_length: int = _field(512, "longest sequence in tokens")
    dropout: float = _field(0.1, "dropout probability")
    activation: str = _field("relu", "activation of the feed-forward part", ACTIVATIONS)
    corpus: tuple[str, ...] = _field(
        (), "text or JSONL files to pretrain on; none: Python's documentation"
    )
    held_out_share: float = _field(0.02, "share of the corpus's documents kept to judge by")
    records: tuple[str, ...] = _field(
        (), "JSONL files of instruction records; none: tasks made of Python's documentation"
    )
    held_out: tuple[str, ...] = _field((), "JSONL files of records to judge by")
    tasks: tuple[str, ...] = _field(DEFAULT_TASKS, "tasks to make where `records` is empty", TASKS)
    language: str = _field("fr", "language of the translation task", tuple(LANGUAGES))
    train_per_task: int = _field(2000, "records a made task is thinned to")
    repeat: tuple[str, ...] = _field(
        (), "how often an epoch shows the records of a task, as TASK=TIMES; others once"
    )
    truncation: str = _field(
        "error",
        "a record too long is an error, or loses the end of its input",
        TRUNCATIONS,
    )
    steps: int = _field(1000, "optimizer steps")
    tokens_per_batch: int = _field(2048, "tokens of a packed batch, at most")
    accumulation: int = _field(1, "batches whose gradients make one step")
    weighting: str = _field(
        "token",
        "what counts alike in the loss: tokens, records, or records by the root of their length",
        WEIGHTINGS,
    )
    masked_share: float = _field(MASKED_SHARE, "share of tokens that the masked objective hides")
    learning_rate: float = _field(1e-3, "highest learning rate")
    warmup_steps: int = _field(100, "steps over which the rate rises to its highest")
    final_rate: float = _field(0.05, "learning rate at the end, as a share of the highest")
    beta1: float = _field(0.9, "AdamW's decay of the mean gradient")
    beta2: float = _field(0.98, "AdamW's decay of the mean square")
    weight_decay: float = _field(0.01, "AdamW's decay of weight matrices")
    clip_norm: float = _field(1.0, "largest norm of the gradient; 0: no limit")
    dtype: str = _field("float32", "dtype of the matrix products; weights are float32", DTYPES)
    device: str = _field("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    save_every: int = _field(200, "steps between checkpoints")
    keep: int = _field(2, "checkpoints that stay, the newest ones")
    seed: int = _field(0, "governs weights, order, masks and dropout")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = getattr(self, spec.name)
            _check_type(spec.name, value, hints[spec.name])
            choices = spec.metadata["choices"]
            for item in value if isinstance(value, tuple) else (value,):
                if choices and item not in choices:
                    raise ValueError(
                        f"{spec.name}: got {item!r}, expected one of {', '.join(choices)}"
                    )
        at_least_one = ("steps", "tokens_per_batch", "accumulation", "save_every", "keep")
        for name in (*at_least_one, "train_per_task", "warmup_steps", "seed"):
            least = 0 if name in ("warmup_steps", "seed") else 1
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected a whole number from {least} up"
                )
        if self.seed >= 2**63:
            raise ValueError(f"seed: got {self.seed}, expected a whole number below 2**63")
        for name in ("final_rate", "beta1", "beta2", "held_out_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        for name in ("beta1", "beta2", "held_out_share"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name}: got 1, expected a number below 1")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or a number above")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a number above 0")
        if not 0 < self.masked_share <= 1:
            raise ValueError(f"masked_share: got {self.masked_share}, expected above 0, at most 1")
        if not self.tasks:
            raise ValueError(f"tasks: got none, expected some of {', '.join(TASKS)}")
        self.repeats()
        self.model_config()

    def repeats(self) -> dict[str, int]:
        """Return `repeat` as a number for each task; raises `ValueError` for one it cannot read."""
        found = {}
        for item in self.repeat:
            task, _, times = item.partition("=")
            if not task or not (times.isascii() and times.isdigit()) or int(times) < 1:
                raise ValueError(f"repeat: got {item!r}, expected TASK=TIMES, times from 1 up")
            if task in found:
                raise ValueError(f"repeat: got {task!r} twice, expected each task once")
            found[task] = int(times)
        return found

    def model_config(self, vocab_size: int | None = None) -> ModelConfig:
        """Return the sizes of a new model; `vocab_size` is that of the tokenizer, once known."""
        return ModelConfig(
            vocab_size=self.vocab_size if vocab_size is None else vocab_size,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            hidden=self.hidden,
            max_length=self.max_length,
            dropout=self.dropout,
            activation=self.activation,
        )

    def with_absolute_paths(self) -> "Recipe":
        """Return the recipe with its files named from the root, for use from another folder."""
        return replace(self, **_from(os.getcwd(), {name: getattr(self, name) for name in PATHS}))

    def to_toml(self) -> str:
        """Return the recipe as TOML, each field with what it means."""
        lines = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            # JSON's strings, numbers and lists are TOML's, but for \u escapes of surrogate pairs
            # and for the one control character that JSON does not escape.
            text = json.dumps(
                list(value) if isinstance(value, tuple) else value, ensure_ascii=False
            ).replace("\x7f", "\\u007f")
            lines += [f"# {spec.metadata['help']}", f"{spec.name} = {text}"]
        return "\n".join(lines) + "\n"


def _check_type(name: str, value: object, hint: Any) -> None:
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name}: got {value!r}, expected a list of strings")
        return
    wanted = {int: "a whole number", float: "a number", str: "a string"}[hint]
    kinds = (int, float) if hint is float else (hint,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected {wanted}")


def _from(folder: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe fields with the files they name, where relative, looked for in `folder`."""
    changed = dict(values)
    for name in PATHS:
        if isinstance(values.get(name), (list, tuple)):
            changed[name] = tuple(
                os.path.normpath(os.path.join(folder, path)) if isinstance(path, str) else path
                for path in values[name]
            )
    return changed


def merged(base: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    """Return `base` with some fields changed.

    Raises `ValueError`, which begins with `where`, for an unknown field and a value out of range.
    """
    known = {spec.name for spec in fields(Recipe)}
    for name in changes:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}, expected some of {sorted(known)}")
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()
    }
    try:
        return replace(base, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_recipe(path: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a TOML file, the default where it is silent, and the fields it sets.

    Files that it names with a relative path are looked for beside it.
    Raises `ValueError` naming the file for one that cannot be read, is not TOML, or has a field
    that is unknown or out of range.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    content = _from(os.path.dirname(os.path.abspath(path)), content)
    return merged(Recipe(), content, str(path)), content


def add_flags(parser: argparse.ArgumentParser, base: Recipe) -> None:
    """Give `parser` a flag for each field, `--learning-rate` for `learning_rate`."""
    group = parser.add_argument_group(
        "recipe", "each field may stand in the TOML file too; a flag wins"
    )
    hints = get_type_hints(Recipe)
    for spec in fields(Recipe):
        hint, default = hints[spec.name], getattr(base, spec.name)
        options: dict[str, Any] = {"type": hint}
        if get_origin(hint) is tuple:
            # A flag given twice adds to the first.
            options = {"type": get_args(hint)[0], "nargs": "*", "action": "extend"}
            default = " ".join(default) or "none"
        choices = spec.metadata["choices"]
        group.add_argument(
            "--" + spec.name.replace("_", "-"),
            dest=spec.name,
            default=argparse.SUPPRESS,
            choices=choices or None,
            metavar=None if choices else hint.__name__.upper() if "nargs" not in options else "X",
            help=f"{spec.metadata['help']} (default: {default})".replace("%", "%%"),
            **options,
        )


def flags_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe fields that the command line set."""
    known = {spec.name for spec in fields(Recipe)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    return _from(os.getcwd(), given)


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Return the names of the fields in which two recipes differ."""
    left, right = asdict(one), asdict(other)
    return [name for name in left if left[name] != right[name]]
