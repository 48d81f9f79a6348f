"""The training loop: what it computes, and what it survives."""

import itertools
import math
import multiprocessing
import os
import random
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

from fuseformer.tuning.batches import PackedSampler
from fuseformer.tuning.objectives import make_objective, weighted_loss
from fuseformer.tuning.runs import CheckpointError, Run, load_tuned
from fuseformer.tuning.tokenizer import Tokenizer
from fuseformer.tuning.train import (
    NonFiniteLossError,
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
    assert (outcome.step, outcome.interrupted) == (RECIPE.steps, False)
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
                patch.setattr("fuseformer.tuning.runs.safetensors.torch.save", full_disk)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(number, tmp_path, whole, monkeypatch, capsys):
    taken = 0

    def interrupting(*arguments):
        nonlocal taken
        taken += 1
        if taken == 5:
            os.kill(os.getpid(), number)
        return weighted_loss(*arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("fuseformer.tuning.train.weighted_loss", interrupting)
        outcome = start(tmp_path)
    assert (outcome.step, outcome.interrupted) == (5, True)
    assert signal.getsignal(number) is before
    message = capsys.readouterr().err
    assert f"{number.name}: stopped after step 5 of 12 and saved" in message
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


def test_tokens_of_a_step_count_alike_however_it_is_cut_into_batches(tmp_path):
    tokenizer = Tokenizer.train(texts(), 300)
    objective = make_objective(RECIPE, tokenizer)
    examples = objective.from_documents(texts(9))
    torch.manual_seed(0)
    model = objective.new_model(RECIPE.model_config(tokenizer.vocab_size)).double().eval()

    def gradients(tokens_per_batch):
        sampler = PackedSampler(
            examples, tokens_per_batch=tokens_per_batch, max_length=48, shuffle=False
        )
        model.zero_grad()
        weight = 0.0
        while sampler.epoch == 0 and sampler.position < len(examples):
            loss, count = weighted_loss(objective, model, next(sampler), "token")
            loss.backward()
            weight += count
        return [p.grad / weight for p in model.parameters()]

    for a, b in zip(gradients(10_000), gradients(60), strict=True):
        torch.testing.assert_close(a, b)


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


def test_a_damaged_checkpoint_is_named(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    state = Run(folder).latest() / "training.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"training.safetensors: not the training state"):
        resume(folder)
    (Run(folder).latest() / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"training.json: cannot be read"):
        resume(folder)


def test_bfloat16_trains_float32_weights(tmp_path):
    start(tmp_path, replace(RECIPE, dtype="bfloat16", steps=3))
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path))
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["tpu:0", "cuda:99", "no device"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="device: got"):
        resolve_device(name)
