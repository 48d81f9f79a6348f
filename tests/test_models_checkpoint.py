import errno
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fuseformer.files import write_atomically
from fuseformer.models import (
    CausalLM,
    EncoderDecoder,
    MaskedLM,
    ModelConfig,
    SequenceClassifier,
    SpanAnswerer,
    load_model,
    pack_ids,
    save_model,
)

CONFIG = ModelConfig(vocab_size=50, width=16, heads=2, layers=2, hidden=24, max_length=20)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, lambda file: file.write(b"first"))
    seen = []

    def write(file):
        file.write(b"second")
        file.flush()
        seen.append(path.read_bytes())

    write_atomically(str(path), write)
    assert seen == [b"first"]
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_previous_file_and_no_partial_one(tmp_path, error):
    path = tmp_path / "state"
    path.write_bytes(b"first")

    def write(file):
        file.write(b"sec")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_disk_that_fills_up_at_the_end_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_bytes(b"first")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_content_name_and_folder_reach_the_disk_in_this_order(tmp_path, monkeypatch):
    path, order = tmp_path / "state", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    def renamed(old, new):
        order.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(path, lambda file: file.write(b"first"))
    assert order == ["content", "name", "folder"]


def test_a_killed_writer_leaves_the_previous_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"first")
    code = (
        "import os, sys; from fuseformer.files import write_atomically\n"
        "write_atomically(sys.argv[1], lambda f: (f.write(b'sec'), f.flush(), os._exit(9)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == b"first"
    write_atomically(path, lambda file: file.write(b"third"))  # the stale partial file is no hurdle
    assert path.read_bytes() == b"third"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


KINDS = {
    "causal_lm": lambda: CausalLM(CONFIG),
    "masked_lm": lambda: MaskedLM(CONFIG),
    "encoder_decoder": lambda: EncoderDecoder(CONFIG),
    "classifier of a masked_lm": lambda: SequenceClassifier(MaskedLM(CONFIG), 3),
    "classifier of a causal_lm": lambda: SequenceClassifier(CausalLM(CONFIG), 2, "first"),
    "span_answerer": lambda: SpanAnswerer(MaskedLM(CONFIG)),
}


def run(model):
    arguments = pack_ids([[3, 1, 4], [1, 5, 9, 2]])
    if isinstance(model, EncoderDecoder):
        arguments *= 2
    model.eval()
    with torch.no_grad():
        result = model(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_model_comes_back_as_it_was(tmp_path, kind, dtype):
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype).train()
    folder = tmp_path / "deep" / "folder"
    save_model(model, folder)
    assert model.training
    before = torch.get_rng_state()
    loaded = load_model(str(folder))
    assert torch.equal(before, torch.get_rng_state())
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name)
        assert torch.equal(parameter, other)
        assert parameter.dtype == other.dtype == dtype
        assert other.requires_grad
    for a, b in zip(run(model), run(loaded), strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    save_model(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_tied_weights_are_stored_once(tmp_path):
    model = CausalLM(CONFIG)
    save_model(model, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    assert sum(t.shape == (CONFIG.vocab_size, CONFIG.width) for t in stored.values()) == 1


def test_a_loaded_model_outlives_its_file(tmp_path):
    save_model(CausalLM(CONFIG), tmp_path)
    loaded = load_model(tmp_path)
    expected = run(loaded)[0]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(run(loaded)[0], expected)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    first, second = CausalLM(CONFIG), CausalLM(CONFIG)
    save_model(first, tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(second, tmp_path)
    monkeypatch.undo()
    assert torch.equal(run(load_model(tmp_path))[0], run(first)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def edit(path, **changes):
    """Set fields of a JSON file; a name with a dot goes one level down, `None` removes."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        place = document
        for step in above:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(document))


def reweigh(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        path.write_bytes(safetensors.torch.save(tensors))

    return damage


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(bytes(content))


NORM = "backbone.blocks.0.attention_norm.weight"
DAMAGES = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", 3000),
        "model.safetensors: truncated or corrupt",
    ),
    "empty weights": (
        lambda f: os.truncate(f / "model.safetensors", 0),
        "model.safetensors: trunc",
    ),
    "corrupt header": (
        lambda f: flip(f / "model.safetensors", 7),
        "model.safetensors: truncated or corrupt",
    ),
    "flipped bit": (lambda f: flip(f / "model.safetensors", -99), "model.safetensors: corrupt"),
    "truncated config": (lambda f: os.truncate(f / "config.json", 40), "config.json: not JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "nested config": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json: not JSON",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "the configuration is list"),
    "another program's": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "config.json: the configuration lacks format_version.*unknown model_type",
    ),
    "unknown kind": (
        lambda f: edit(f / "config.json", kind="gpt"),
        "kind is 'gpt', expected one of",
    ),
    "kind no text": (
        lambda f: edit(f / "config.json", kind=[1]),
        r"kind is \[1\], expected one of",
    ),
    "newer format": (
        lambda f: edit(f / "config.json", format_version=2, extra=1),
        "config.json: written in format 2 by a newer fuseformer",
    ),
    "version no number": (
        lambda f: edit(f / "config.json", format_version="1"),
        "format_version is '1', expected 1",
    ),
    "unknown field": (
        lambda f: edit(f / "config.json", config__rope=True),
        "config.json: config has unknown rope",
    ),
    "missing field": (
        lambda f: edit(f / "config.json", config__width=None),
        "config.json: config lacks width",
    ),
    "bad value": (lambda f: edit(f / "config.json", config__heads=0), "config.json: heads: got 0"),
    "bad type": (
        lambda f: edit(f / "config.json", config__dropout="much"),
        "config.json: ",
    ),
    "no head": (lambda f: edit(f / "config.json", head__classes=None), "head lacks classes"),
    "bad head": (lambda f: edit(f / "config.json", head__classes=0), "config.json: classes: got 0"),
    "bad backbone": (
        lambda f: edit(f / "config.json", head__backbone="encoder_decoder"),
        "config.json: backbone is 'encoder_decoder', expected one of causal_lm, masked_lm",
    ),
    "other sizes": (
        lambda f: edit(f / "config.json", config__width=32),
        r"model.safetensors: weight .* has shape .*, config.json wants",
    ),
    "more layers": (
        lambda f: edit(f / "config.json", config__layers=3),
        "model.safetensors: lacks weight backbone.blocks.2.* and 11 more",
    ),
    "endless layers": (
        lambda f: edit(f / "config.json", config__layers=10**12),
        "config.json: layers is 1000000000000, model.safetensors has 27 weights",
    ),
    "fewer layers": (
        lambda f: edit(f / "config.json", config__layers=1),
        "model.safetensors: has unknown weight backbone.blocks.1",
    ),
    "a huge vocabulary": (
        lambda f: edit(f / "config.json", config__vocab_size=10**12),
        "has shape",
    ),
    "renamed weight": (
        reweigh(lambda t: t.update({"norm": t.pop(NORM)})),
        f"model.safetensors: lacks weight {NORM}, judged by config.json",
    ),
    "whole numbers": (
        reweigh(lambda t: t.update({NORM: t[NORM].int()})),
        f"model.safetensors: weight {NORM} has dtype torch.int32, expected floats",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line_that_names_the_file(tmp_path, damage):
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    save_model(SequenceClassifier(MaskedLM(CONFIG), 3), folder)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_that_another_tool_wrote_are_welcome(tmp_path):
    save_model(SequenceClassifier(MaskedLM(CONFIG), 3), tmp_path)
    reweigh(lambda tensors: tensors[NORM].zero_())(tmp_path)  # no checksum afterwards
    assert not load_model(tmp_path).get_parameter(NORM).any()


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(TypeError, match="model: got Linear, expected one of causal_lm"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "no")
    assert not (tmp_path / "no").exists()
