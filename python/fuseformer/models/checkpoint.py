"""Models on disk: a folder with `model.safetensors` and `config.json`, each whole or not there."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import sync_folder, write_atomically
from .blocks import Embedding
from .causal_lm import CausalLM
from .config import ModelConfig
from .encoder_decoder import EncoderDecoder
from .heads import SequenceClassifier, SpanAnswerer
from .language_model import LanguageModel
from .masked_lm import MaskedLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT_VERSION = 1

Model = CausalLM | MaskedLM | EncoderDecoder | SequenceClassifier | SpanAnswerer

_BACKBONES: dict[str, type[LanguageModel]] = {"causal_lm": CausalLM, "masked_lm": MaskedLM}
_KINDS: dict[str, type[nn.Module]] = {
    **_BACKBONES,
    "encoder_decoder": EncoderDecoder,
    "sequence_classifier": SequenceClassifier,
    "span_answerer": SpanAnswerer,
}
_HEAD_FIELDS: dict[str, tuple[str, ...]] = {
    "sequence_classifier": ("backbone", "classes", "pooling"),
    "span_answerer": ("backbone",),
}


def _kind(model: nn.Module) -> str:
    for kind, made in _KINDS.items():
        if type(model) is made:
            return kind
    raise TypeError(f"model: got {type(model).__name__}, expected one of {_listed(_KINDS)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _description(model: nn.Module) -> dict[str, Any]:
    """Return what `config.json` says of a model."""
    kind = _kind(model)
    backbone: Any = model
    head: dict[str, Any] = {}
    if isinstance(model, SequenceClassifier | SpanAnswerer):
        backbone = model.backbone
        head["backbone"] = _kind(backbone)
    if isinstance(model, SequenceClassifier):
        head.update(classes=model.classes, pooling=model.pooling)
    config = asdict(backbone.config)
    return {"format_version": FORMAT_VERSION, "kind": kind, "config": config, "head": head}


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return the CRC-32 of all bytes: safetensors itself does not see a flipped one."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def serialized(tensors: dict[str, Tensor]) -> bytes:
    """Return CPU tensors as the bytes of a safetensors file that tells of flipped bits."""
    import safetensors.torch

    # One entry and no more: safetensors writes several in an order that changes.
    return safetensors.torch.save(tensors, {"crc32": _checksum(tensors)})


def save_model(model: Model, folder: str | Path) -> None:
    """Write `model` to `folder`, which is made if need be.

    Weights that the model uses twice are stored once, in their own dtype. Each file is replaced
    whole or not at all; the configuration is written last, so that a new folder with one is
    complete. Raises `TypeError` for a model of another class, and `OSError` where the disk is full
    or the folder cannot be written.
    """
    description = json.dumps(_description(model), indent=1) + "\n"
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    content = serialized(tensors)
    folder = Path(folder)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    write_atomically(folder / WEIGHTS, lambda file: file.write(content))
    write_atomically(folder / CONFIG, lambda file: file.write(description.encode()))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _existing(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder, expected one that save_model wrote")
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected the one that save_model writes")
    return path


def _check_fields(path: Path, what: str, got: Any, expected: Iterable[str]) -> dict[str, Any]:
    """Return `got` after requiring an object with the `expected` fields and no other."""
    if not isinstance(got, dict):
        raise ValueError(f"{path}: {what} is {type(got).__name__}, expected an object")
    missing = [name for name in expected if name not in got]
    unknown = [name for name in got if name not in set(expected)]
    if missing or unknown:
        problems = [f"lacks {_listed(missing)}"] if missing else []
        problems += [f"has unknown {_listed(unknown)}"] if unknown else []
        raise ValueError(f"{path}: {what} {' and '.join(problems)}")
    return got


def _choose(path: Path, what: str, got: Any, known: dict[str, Any]) -> Any:
    if not isinstance(got, str) or got not in known:
        raise ValueError(f"{path}: {what} is {got!r}, expected one of {_listed(known)}")
    return known[got]


def _read_description(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(_existing(path).read_bytes().decode())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {_one_line(error)}") from error
    # The version first: a newer format may well have other fields.
    version = described.get("format_version") if isinstance(described, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: written in format {version} by a newer fuseformer, expected at most "
            f"{FORMAT_VERSION}"
        )
    names = ("format_version", "kind", "config", "head")
    described = _check_fields(path, "the configuration", described, names)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}")
    kind = described["kind"]
    _choose(path, "kind", kind, _KINDS)
    _check_fields(path, "config", described["config"], [f.name for f in fields(ModelConfig)])
    _check_fields(path, "head", described["head"], _HEAD_FIELDS.get(kind, ()))
    return described


def _build(path: Path, described: dict[str, Any], weights: int) -> nn.Module:
    """Return the described model without storage; it has fewer layers than `weights`."""
    kind, head = described["kind"], dict(described["head"])
    made: Any = _KINDS[kind]
    try:
        config = ModelConfig(**described["config"])
        if config.layers > weights:  # before they are made, which could take forever
            raise ValueError(f"layers is {config.layers}, {WEIGHTS} has {weights} weights")
        with torch.device("meta"):
            if kind not in _HEAD_FIELDS:
                return made(config)
            backbone = _choose(path, "backbone", head.pop("backbone"), _BACKBONES)
            return made(backbone(config), **head)
    except (TypeError, ValueError) as error:
        message = _one_line(error)
        prefix = "" if message.startswith(str(path)) else f"{path}: "
        raise ValueError(f"{prefix}{message}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a safetensors file's tensors; raises `ValueError` where it is missing or damaged."""
    import safetensors

    try:
        with safetensors.safe_open(_existing(path), framework="pt") as file:
            # Copies, and not views of the file, which is then free to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get("crc32")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt: {_one_line(error)}") from error
    if checksum is not None and checksum != _checksum(tensors):
        raise ValueError(f"{path}: corrupt: its checksum does not fit the content")
    return tensors


def _check_weights(path: Path, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    for names, problem in ((missing, "lacks"), (unknown, "has unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path}: {problem} weight {names[0]}{more}, judged by {CONFIG}")
    for name, tensor in got.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: weight {name} has shape {tuple(tensor.shape)}, {CONFIG} wants "
                f"{tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: weight {name} has dtype {tensor.dtype}, expected floats")


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """Return the model that `save_model` wrote to `folder`, on `device` and in evaluation mode.

    Its weights have the dtype that they were stored in; no random number is drawn. Raises
    `ValueError`, one line that names the file, where the folder or a file is missing, is truncated
    or corrupt, is not JSON, belongs to another program or a newer format, or where the weights are
    not those of the configuration.
    """
    config_path, weights_path = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    described = _read_description(config_path)
    tensors = read_tensors(weights_path)
    model = _build(config_path, described, len(tensors))
    _check_weights(weights_path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(module, Embedding):
            module.fill_positions()
    return model.to(device).eval()  # type: ignore[return-value]
