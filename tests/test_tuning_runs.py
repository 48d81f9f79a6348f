"""The folder of a run: what belongs to the run, who owns it, and what a signal leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import RECIPE, RECIPE_FLAGS, losses, resume, start, write_corpus, write_records

from fuseformer.cli import main
from fuseformer.tuning import demo
from fuseformer.tuning.ownership import owned
from fuseformer.tuning.runs import CheckpointError, Run
from fuseformer.tuning.signals import StopRequest
from fuseformer.tuning.train import train

COMMAND = [sys.executable, "-m", "fuseformer_command"]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl")


def pretrain(corpus, folder, *flags):
    arguments = ("pretrain", "--corpus", corpus, "--output", folder, *RECIPE_FLAGS, *flags)
    return [str(argument) for argument in arguments]


# --- what belongs to the run ---------------------------------------------------------------------


def test_what_the_user_puts_beside_the_checkpoints_stays(tmp_path):
    start(tmp_path, replace(RECIPE, steps=6))
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-00000003-best", "step-00000005", "step-00000006.removed-by-me"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_text("mine")
    (checkpoints / "step-notes.txt").write_text("mine")
    (checkpoints / "step-00000003" / "notes.txt").write_text("mine")  # of one that will go
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(re.sub(r"(?m)^steps = 6$", "steps = 12", recipe.read_text()))
    resume(tmp_path)
    kept = {str(p.relative_to(checkpoints)) for p in checkpoints.rglob("*") if p.is_file()}
    assert {n for n in kept if Path(checkpoints, n).read_bytes() == b"mine"} == {
        "step-00000003-best/model.safetensors",
        "step-00000005/model.safetensors",
        "step-00000006.removed-by-me/model.safetensors",
        "step-notes.txt",
        "step-00000003.removed/notes.txt",
    }
    assert [p.name for p in Run(tmp_path).checkpoints()] == ["step-00000009", "step-00000012"]


def test_a_folder_of_the_name_of_the_next_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    start(tmp_path / "run", replace(RECIPE, steps=3))
    recipe = tmp_path / "run" / "recipe.toml"
    recipe.write_text(re.sub(r"(?m)^steps = 3$", "steps = 6", recipe.read_text()))
    other = tmp_path / "run" / "checkpoints" / "step-00000006"
    other.mkdir()
    (other / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="step-00000006: is there already, and not from this"):
        resume(tmp_path / "run")
    assert (other / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.toml", "run.json", "checkpoints/a", "x"])
def test_a_folder_with_other_things_is_refused(name, tmp_path, corpus, capsys):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert main(pretrain(corpus, tmp_path / "run")) == 2
    assert name.split("/")[0] in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert [
        p.relative_to(tmp_path / "run") for p in (tmp_path / "run").rglob("*") if p.is_file()
    ] == [Path(name)]


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_anew(tmp_path, corpus):
    run = Run(tmp_path / "run")
    run.create(RECIPE)
    run.write_log([{"step": 1, "loss": 1.0}])
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(pretrain(corpus, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert losses(tmp_path / "run")[0][0] == 1
    assert losses(tmp_path / "run")[0][1] != 1.0


def test_a_run_of_before_there_were_manifests_goes_on(tmp_path):
    start(tmp_path, replace(RECIPE, steps=6))
    (tmp_path / "run.json").unlink()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(re.sub(r"(?m)^steps = 6$", "steps = 12", recipe.read_text()))
    (tmp_path / "checkpoints" / "step-00000003-best").mkdir()
    assert resume(tmp_path).step == 12
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003-best", "step-00000009", "step-00000012"]


def test_a_damaged_manifest_is_named(tmp_path):
    start(tmp_path, replace(RECIPE, steps=3))
    for text in (
        "{",
        "[]",
        json.dumps({"kind": "else"}),
        '{"kind": "fuseformer run", "checkpoints": 1}',
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: not the list of a run's files"):
            resume(tmp_path)


def test_a_demonstration_replaces_its_own_files_alone(tmp_path):
    for name in (*demo.RUNS, demo.REPORT):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} is not from a demonstration"):
            demo.run_demo(tmp_path, quick=True)
        (tmp_path / name).unlink()
    (tmp_path / demo.MARK).touch()
    start(tmp_path / "tune", replace(RECIPE, steps=3))
    (tmp_path / "tune" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no run has written"):
        demo.run_demo(tmp_path, quick=True)
    assert [path.name for path in (tmp_path / "tune").iterdir()] == ["notes.txt"]


# --- one owner -----------------------------------------------------------------------------------


def test_a_second_process_is_told_who_owns_the_run(tmp_path, corpus, capsys):
    folder = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from fuseformer.tuning.ownership import owned\n"
        "with owned(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        for flags in ((), ("--resume",)):
            assert main(pretrain(corpus, folder, *flags)) == 2
            line = capsys.readouterr().err
            assert f"{folder} is in use by process {holder.pid} on " in line
            assert " since 2" in line
    finally:
        holder.kill()  # nothing is left to be tidied up by it
        holder.wait()
    assert main(pretrain(corpus, folder)) == 0


def test_bad_input_leaves_no_folder(tmp_path, capsys):
    assert main(pretrain(tmp_path / "missing.txt", tmp_path / "new")) == 2
    assert not (tmp_path / "new").exists()
    with owned(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert (tmp_path / "new" / "file").exists()


@pytest.mark.parametrize("command", ["pretrain", "tune", "demo"])
def test_several_processes_of_a_launcher_do_not_train_apart(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "--output", str(tmp_path / "run")]) == 2
    assert "WORLD_SIZE: got 2, but this command trains in one process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- signals -------------------------------------------------------------------------------------


def _signal_when(process, log, number, seconds=60):
    deadline = time.monotonic() + seconds
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_with_its_status(number, status, tmp_path, corpus):
    folder = tmp_path / "run"
    flags = ("--steps", 100_000, "--save-every", 100_000)
    process = subprocess.Popen(
        COMMAND + pretrain(corpus, folder, *flags), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    _signal_when(process, folder / "metrics.jsonl", number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == b""
    assert b"%s: stopped after step" % number.name.encode() in err
    assert len(Run(folder).checkpoints()) == 1


def test_an_interrupted_demonstration_says_so_with_its_status(tmp_path, monkeypatch):
    def interrupting(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments, **options)

    from fuseformer.tuning.train import _train_step as train_step

    monkeypatch.setattr("fuseformer.tuning.train._train_step", interrupting)
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 143


@pytest.mark.parametrize("command", ["pretrain", "tune"])
def test_a_signal_before_the_first_step_leaves_a_run_to_resume(
    command, tmp_path, corpus, monkeypatch, capsys
):
    data = ("--records", write_records(tmp_path / "records.jsonl")) if command == "tune" else ()
    data = data or ("--corpus", corpus)

    def arguments(folder):
        at = RECIPE_FLAGS.index("--held-out-share")  # which tuning does not take
        flags = RECIPE_FLAGS[:at] + RECIPE_FLAGS[at + 2 :]
        return [str(a) for a in (command, "--output", folder, *data, *flags)]

    assert main(arguments(tmp_path / "whole")) == 0

    def interrupting(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return train(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("fuseformer.tuning.commands.train", interrupting)
        assert main(arguments(tmp_path / "run")) == 130
    assert "SIGINT: stopped after step 0 of 12 and saved" in capsys.readouterr().err
    assert main([command, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_second_signal_acts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# --- a busy machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "expected"), [(None, "passive"), ("active", "active")])
def test_the_command_has_threads_wait_passively_unless_told_otherwise(chosen, expected):
    code = (
        "import os, sys, runpy\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "sys.argv = ['fuseformer', '--version']\n"
        "runpy.run_module('fuseformer_command', run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if chosen:
        environment["OMP_WAIT_POLICY"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == expected


def test_the_library_leaves_the_policy_of_threads_alone():
    code = "import os, fuseformer; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"


def test_the_installed_command_is_the_one_that_sets_the_policy():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="fuseformer")
    assert command.value == "fuseformer_command:main"
