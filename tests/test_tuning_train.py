"""The training loop: what it computes, and what it survives."""

import copy
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import RECIPE, losses, resume, start, texts

from fuseformer.models.checkpoint import read_tensors, serialized
from fuseformer.tuning.batches import PackedSampler, collate
from fuseformer.tuning.objectives import make_objective, weighted_loss
from fuseformer.tuning.runs import CheckpointError, Run, load_tuned
from fuseformer.tuning.tokenizer import Tokenizer
from fuseformer.tuning.train import (
    NonFiniteLossError,
    _train_step,
    learning_rate,
    make_optimizer,
    resolve_device,
)

SUPPORT = Path(__file__).parent / "support"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = start(folder)
    assert (outcome.step, outcome.signal) == (RECIPE.steps, "")
    return folder


def weights(folder):
    return load_tuned(folder)[0].state_dict()


def assert_same_end(folder, expected):
    assert losses(folder) == losses(expected)
    ours, theirs = weights(folder), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_learning_lowers_the_loss(tmp_path):
    start(tmp_path, replace(RECIPE, steps=60, learning_rate=1e-2, save_every=60))
    values = [loss for _, loss in losses(tmp_path)]
    assert sum(values[-5:]) < 0.6 * sum(values[:5])


def test_log_and_checkpoints_of_a_run(whole):
    log = Run(whole).read_log()
    assert [line["step"] for line in log] == list(range(1, 13))
    assert all(line["tokens"] > 0 and line["seconds"] > 0 for line in log)
    assert [line["learning_rate"] for line in log] == [learning_rate(i, RECIPE) for i in range(12)]
    names = [path.name for path in Run(whole).checkpoints()]
    assert names == ["step-00000009", "step-00000012"]  # keep is 2
    assert Run(whole).recipe == RECIPE


def test_the_rate_rises_then_falls_to_its_end():
    recipe = replace(RECIPE, steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    rates = [learning_rate(step, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # halfway down
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_vectors_are_not_decayed():
    tokenizer = Tokenizer.train(texts(), 300)
    model = make_objective(RECIPE, tokenizer).new_model(RECIPE.model_config(300))
    matrices, vectors = make_optimizer(model, RECIPE).param_groups
    assert all(p.dim() > 1 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (RECIPE.weight_decay, 0)
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_a_resumed_run_is_bit_identical(kind, tmp_path):
    recipe = replace(RECIPE, objective=kind, accumulation=2, steps=6)
    expected, folder = tmp_path / "expected", tmp_path / "resumed"
    start(expected, recipe)
    # The same recipe stops when the disk fills up behind step 3.
    with pytest.raises(CheckpointError):
        _start_with_full_disk(folder, recipe, after=1)
    outcome = resume(folder)
    assert outcome.step == 6
    assert_same_end(folder, expected)


def _start_with_full_disk(folder, recipe, after):
    """Train while every checkpoint but the first `after` ones meets a full disk."""
    written = 0

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    save = Run.save

    def counting(self, *arguments, **options):
        nonlocal written
        written += 1
        with pytest.MonkeyPatch.context() as patch:
            if written > after:
                patch.setattr("fuseformer.tuning.runs.serialized", full_disk)
            return save(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", counting)
        start(folder, recipe)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, whole):
    with pytest.raises(CheckpointError, match=r"No space left.*last good.*step-00000003"):
        _start_with_full_disk(tmp_path / "run", RECIPE, after=1)
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "step-00000003"
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_a_file_size_limit_is_a_full_disk_of_the_kernel(tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tiny_runs import start\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "start(Path(sys.argv[1]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "CheckpointError" in done.stderr
    assert "File too large); there is none before it" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_stops_before_it_moves_anything(what, tmp_path, monkeypatch):
    calls = 0

    def poisoned(objective, model, batch, weighting):
        nonlocal calls
        calls += 1
        loss, weight = weighted_loss(objective, model, batch, weighting)
        if calls == 5:
            if what == "loss":
                return loss * math.nan, weight
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, weight

    monkeypatch.setattr("fuseformer.tuning.train.weighted_loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*step-00000003"):
        start(tmp_path)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]
    assert Run(tmp_path).latest().name == "step-00000003"


@pytest.mark.parametrize("at", [5, 6])  # between two checkpoints, and in the step of one
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_the_run_goes_on(number, at, tmp_path, whole, monkeypatch, capsys):
    taken, saved = 0, []
    save = Run.save

    def interrupting(*arguments):
        nonlocal taken
        taken += 1
        if taken == at:
            os.kill(os.getpid(), number)
        return weighted_loss(*arguments)

    def noted(run, step, *arguments):
        saved.append(step)
        return save(run, step, *arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("fuseformer.tuning.train.weighted_loss", interrupting)
        patch.setattr(Run, "save", noted)
        outcome = start(tmp_path)
    assert saved == [3, at]
    assert (outcome.step, outcome.signal) == (at, number.name)
    assert signal.getsignal(number) is before
    message = capsys.readouterr().err
    assert f"{number.name}: stopped after step {at} of 12 and saved" in message
    resume(tmp_path)
    assert_same_end(tmp_path, whole)


def _train_in_child(folder, recipe):
    torch.set_num_threads(1)
    if Run(folder).checkpoints():
        resume(folder)
    else:
        start(folder, recipe)


def test_kills_at_random_moments_leave_a_checkpoint_to_resume_from(tmp_path):
    recipe = replace(RECIPE, steps=400, save_every=1)
    folder, draw = tmp_path / "killed", random.Random(0)
    context = multiprocessing.get_context("fork")
    seen, kills = 0, 0
    while kills < 20:
        child = context.Process(target=_train_in_child, args=(folder, recipe))
        child.start()
        # The first checkpoint of this child shows that it is at work; a random moment after that.
        deadline = time.monotonic() + 60
        while child.is_alive() and not _beyond(folder, seen) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))
        assert child.is_alive(), "the run ended before it could be killed 20 times"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        newest = Run(folder).latest()
        load_tuned(newest)  # intact
        assert int(newest.name[5:]) > seen
        seen = int(newest.name[5:])
    expected = tmp_path / "expected"
    shortened = replace(recipe, save_every=400)
    start(expected, shortened)
    resume(folder)
    assert losses(folder) == losses(expected)
    ours, theirs = weights(folder), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _beyond(folder, step):
    found = Run(folder).checkpoints()
    return bool(found) and int(found[-1].name[5:]) > step


@pytest.mark.parametrize(("weighting", "power"), [("token", 1), ("root", 0.5), ("record", 0)])
def test_weightings_are_means_over_tokens_records_or_between(weighting, power):
    tokenizer = Tokenizer.train(texts(), 300)
    objective = make_objective(RECIPE, tokenizer)
    examples = objective.from_documents([texts()[0][:20], texts()[1]])
    torch.manual_seed(0)
    model = objective.new_model(RECIPE.model_config(tokenizer.vocab_size)).eval()
    total, weight = _one_batch(objective, model, examples, weighting)
    parts = [_one_batch(objective, model, [example], "token") for example in examples]
    assert parts[0][1] < parts[1][1]
    assert weight == pytest.approx(sum(count**power for _, count in parts))
    torch.testing.assert_close(total, sum(loss / count * count**power for loss, count in parts))


def _one_batch(objective, model, examples, weighting):
    sampler = PackedSampler(examples, tokens_per_batch=10_000, max_length=48, shuffle=False)
    return weighted_loss(objective, model, next(sampler), weighting)


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def _rewrite(path, change):
    tensors = read_tensors(path)
    change(tensors)
    path.write_bytes(serialized(tensors))


def _without_optimizer(tensors):
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


def _with_other_shapes(tensors):
    tensors["optimizer.0.exp_avg"] = torch.zeros(3)


def _with_a_short_generator(tensors):
    tensors["random.cpu"] = tensors["random.cpu"][:8].clone()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("training.safetensors", _flip_a_bit),
        ("training.safetensors", lambda path: _rewrite(path, _without_optimizer)),
        ("training.safetensors", lambda path: _rewrite(path, _with_other_shapes)),
        ("training.safetensors", lambda path: _rewrite(path, _with_a_short_generator)),
        ("training.json", lambda path: path.write_text("{")),
        ("training.json", lambda path: path.write_text('{"step": 12}')),
        ("../../metrics.jsonl", lambda path: path.write_text("garbage\n")),
        ("../../metrics.jsonl", lambda path: path.write_text("{}\n")),
    ],
)
def test_damaged_state_is_named_and_not_resumed_from(name, damage, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(Run(folder).latest() / name)
    with pytest.raises(CheckpointError, match=re.escape(name.rsplit("/", 1)[-1])):
        resume(folder)


def test_leftovers_of_a_kill_are_cleared_and_never_resumed_from(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    run = Run(folder)
    run.manifest.write([*run.manifest.names(), "step-00000003", "step-00000015"])
    for left in ("step-00000015.partial", "step-00000003.removed", "step-00000012.replaced"):
        shutil.copytree(run.latest(), folder / "checkpoints" / left)
    assert [p.name for p in run.checkpoints()] == ["step-00000009", "step-00000012"]
    shutil.rmtree(run.latest())
    resume(folder)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000009", "step-00000012"]
    assert_same_end(folder, whole)


def test_a_log_on_a_full_disk_names_the_checkpoint(tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        if self.name == "metrics.jsonl" and Run(tmp_path).checkpoints():
            raise OSError(28, "No space left on device")
        return OPEN(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be .*step-00000003"):
        start(tmp_path)


OPEN = Path.open


def test_a_step_is_the_clipped_adam_step_of_the_mean_over_its_tokens():
    tokenizer = Tokenizer.train(texts(), 300)
    recipe = replace(RECIPE, clip_norm=0.05, learning_rate=0.1)
    objective = make_objective(recipe, tokenizer)
    examples = objective.from_documents([texts()[0][:20], texts()[1], texts()[2]])
    torch.manual_seed(0)
    model = objective.new_model(recipe.model_config(tokenizer.vocab_size)).double().eval()
    twin = copy.deepcopy(model)
    batches = [collate(examples[:1]), collate(examples[1:])]  # of unequal size
    loss, norm = _train_step(model, objective, batches, make_optimizer(model, recipe), recipe)
    expected, count = weighted_loss(objective, twin, collate(examples), "token")
    (expected / count).backward()
    whole_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), recipe.clip_norm)
    make_optimizer(twin, recipe).step()
    torch.testing.assert_close(loss, expected.detach() / count, check_dtype=False)
    torch.testing.assert_close(norm, whole_norm)
    assert norm > 2 * recipe.clip_norm
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        # Adam's step hides a factor of the gradient, so the gradients are compared too.
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_trains_float32_weights(tmp_path, whole):
    start(tmp_path, replace(RECIPE, dtype="bfloat16", steps=3))
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path))
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.float32}
    pairs = zip(losses(tmp_path), losses(whole), strict=False)
    apart = [abs(low[1] - full[1]) for low, full in pairs]
    assert 0 < apart[0] < 0.1  # the same batch and weights, rounded


@pytest.mark.parametrize("name", ["tpu:0", "cuda:99", "no device"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="device: got"):
        resolve_device(name)
