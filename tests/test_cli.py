"""The command line, as a user types it."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_runs import RECIPE_FLAGS, write_corpus, write_records

from fuseformer._version import __version__
from fuseformer.cli import main
from fuseformer.tuning.runs import Run, load_tuned


def refused(capsys, *arguments):
    """Run a command that must fail with one line and status 2; return the line."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.strip()


def run(*arguments):
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    run("pretrain", "--output", folder, "--corpus", corpus, *RECIPE_FLAGS)
    return folder


@pytest.fixture(scope="module")
def tuned(pretrained, records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    run(
        *("tune", "--model", pretrained, "--output", folder, "--records", records),
        *("--held-out", records, "--steps", 300, "--learning-rate", 0.005, "--weighting", "record"),
        *("--tokens-per-batch", 400, "--save-every", 300),
    )
    return folder


def test_info_names_versions_and_why_a_backend_cannot_run(capsys):
    run("info")
    text = capsys.readouterr().out
    assert f"fuseformer {__version__}" in text
    assert torch.__version__.split("+")[0] in text
    assert "reference    can run" in text
    assert "triton       no: Triton kernels do not run on cpu tensors" in text


def test_info_for_programs_says_the_same(capsys):
    run("info", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["fuseformer"] == __version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["build"]["mode"] in ("none", "cpu", "cuda")
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["backends"]["reference"] is None
    assert "do not run on cpu tensors" in cpu["backends"]["triton"]


def test_doctor_runs_what_can_run(capsys):
    run("doctor")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row[0] == "cpu"]
    assert [row[1] for row in rows] == ["cuda", "triton", "cpu", "reference"]
    assert [row[2] for row in rows] == ["cannot", "cannot", "ok", "ok"]


def test_doctor_finds_a_backend_that_is_wrong(capsys, monkeypatch):
    from fuseformer import doctor

    right = doctor.attention
    monkeypatch.setattr(doctor, "attention", lambda *a, **k: right(*a, **k) * 1.05)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert "FAILED      AssertionError: out: error" in out
    assert "cpu on cpu, reference on cpu gave no right answer" in err


def test_doctor_tells_of_a_broken_library(capsys, monkeypatch):
    from fuseformer import extension

    monkeypatch.setattr(extension, "build", lambda: {"mode": "cpu", "architectures": []})
    monkeypatch.setattr(extension, "problem", lambda: "the compiled library _C is missing")
    assert main(["doctor"]) == 2
    assert "library    FAILED      the compiled library _C is missing" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sing"], ["info", "--loud"], ["pretrain"]])
def test_bad_command_lines_exit_with_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fuseformer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "pretrain", "tune", "evaluate", "generate", "demo"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: fuseformer {command}" in text
    if command in ("pretrain", "tune"):
        assert re.search(r"--learning-rate FLOAT\s+highest learning rate \(default: 0.001\)", text)


def test_info_needs_nothing_of_the_tune_extra():
    code = (
        "import sys\n"
        "blocked = ('tokenizers', 'safetensors', 'sacrebleu', 'rouge_score', 'tqdm', 'jinja2')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "from fuseformer.cli import main\n"
        "assert main(['info']) == 0\n"
        "sys.exit(main(['generate', 'nowhere', 'text']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "fuseformer[tune]"' in done.stderr


def test_pretrain_then_generate_and_evaluate(pretrained, capsys, tmp_path):
    capsys.readouterr()
    run("generate", pretrained, "the quick", "--max-new-tokens", 5)
    text = capsys.readouterr().out
    assert text.startswith("the quick")
    sampled = ("--no-repeat", 2, "--temperature", 2.0, "--top-k", 50, "--top-p", 0.9, "--seed", 7)
    outputs = []
    for _ in range(2):
        run("generate", pretrained, "the quick", "--max-new-tokens", 5, *sampled)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != text
    figures = tmp_path / "figures.json"
    run("evaluate", pretrained, "--json", figures)
    assert "held-out documents perplexity" in capsys.readouterr().out
    metrics = json.loads(figures.read_text())["metrics"]
    assert 1 < metrics["held-out documents"]["perplexity"] < 300


def test_tuning_learns_its_records(tuned, records, capsys, tmp_path):
    capsys.readouterr()
    run("evaluate", tuned, "--json", tmp_path / "own.json")
    assert "classification accuracy" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "own.json").read_text())["metrics"]["classification"]
    assert metrics["accuracy"] > 90  # half of it is chance
    run("generate", tuned, "--instruction", "Which?", "--input", "owl lazy")
    assert capsys.readouterr().out.strip() in ("first", "second")


def test_tuning_may_drop_more_than_pretraining_did(pretrained, records, tmp_path):
    flags = ("--model", pretrained, "--records", records, "--steps", 1)
    for name, given, expected in (("same", (), 0.1), ("more", ("--dropout", 0.4), 0.4)):
        run("tune", *flags, *given, "--output", tmp_path / name)
        model, _, _ = load_tuned(tmp_path / name)
        assert model.config.dropout == Run(tmp_path / name).recipe.dropout == expected
        assert model.embedding.dropout.p == expected


def test_resume_goes_on_and_keeps_its_recipe(corpus, pretrained, tmp_path, capsys):
    folder = tmp_path / "run"
    run("pretrain", "--output", folder, "--corpus", corpus, *RECIPE_FLAGS)
    for path in Run(folder).latest().iterdir():
        path.unlink()
    Run(folder).latest().rmdir()
    assert Run(folder).latest().name == "step-00000009"
    run("pretrain", "--output", folder, "--resume")
    assert Run(folder).latest().name == "step-00000012"
    ours, theirs = (
        [(line["step"], line["loss"]) for line in Run(f).read_log()] for f in (folder, pretrained)
    )
    assert ours == theirs
    capsys.readouterr()
    line = refused(capsys, "pretrain", "--output", folder, "--resume", "--steps", 99)
    assert "steps: a resumed run keeps its recipe, 12 here" in line


@pytest.mark.parametrize("objective", ["masked", "seq2seq"])
def test_other_objectives_train_and_are_judged(objective, corpus, records, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ("--objective", objective, "--output", folder, *RECIPE_FLAGS)
    run("pretrain", "--corpus", corpus, *flags)
    run("evaluate", folder)
    assert "held-out documents perplexity" in capsys.readouterr().out
    if objective == "masked":
        line = refused(
            capsys, *("tune", "--model", folder, "--output", tmp_path / "t"),
            *("--objective", "masked", "--records", records),
        )  # fmt: skip
        assert "cannot answer instructions" in line
        assert "cannot write" in refused(capsys, "generate", folder, "the")
        return
    run(
        *("tune", "--model", folder, "--output", tmp_path / "t", "--objective", objective),
        *("--records", records, "--held-out", records, "--steps", 5),
    )
    run("evaluate", tmp_path / "t", "--limit", 4)
    assert "classification accuracy" in capsys.readouterr().out
    run("generate", tmp_path / "t", "--instruction", "Which?", "--input", "fox")


def test_what_a_user_gets_wrong_is_one_line(corpus, records, pretrained, tmp_path, capsys):
    capsys.readouterr()
    out = ("--output", tmp_path / "new")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    assert "bad.jsonl, line 2" in refused(capsys, "pretrain", *out, "--corpus", bad)
    bad.write_text('{"instruction": "a", "output": "b", "task": "c"}\nnonsense\n')
    assert "bad.jsonl, line 2: not JSON" in refused(capsys, "tune", *out, "--records", bad)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "no text in" in refused(capsys, "pretrain", *out, "--corpus", empty)
    line = refused(capsys, "pretrain", "--output", pretrained, "--corpus", corpus, *RECIPE_FLAGS)
    assert "holds a run already; pass --resume" in line
    assert "no checkpoint of a run" in refused(
        capsys, "pretrain", "--output", tmp_path / "none", "--resume"
    )
    line = refused(capsys, "tune", *out, "--model", pretrained, "--width", 64)
    assert "width: got 64, but the model has 16" in line
    line = refused(
        capsys, "tune", *out, "--model", pretrained, "--objective", "seq2seq", "--records", records
    )
    assert "holds a CausalLM" in line
    line = refused(capsys, "generate", pretrained, "the " * 50)
    assert "has room for" in line
    line = refused(capsys, "pretrain", *out, "--corpus", corpus, "--device", "cuda:77")
    assert "device: got 'cuda:77'" in line
    assert "temperature: got -1" in refused(
        capsys, *("generate", pretrained, "a", "--temperature", -1, "--max-new-tokens", 2)
    )
    assert "expected a file in a folder that exists" in refused(
        capsys, "evaluate", pretrained, "--json", tmp_path / "none" / "figures.json"
    )
    line = refused(
        capsys, *("tune", *out, "--model", pretrained, "--records", records),
        *("--repeat", "singing=3"),
    )  # fmt: skip
    assert "repeat: got 3 for 'singing'" in line
    recipe = tmp_path / "bad.toml"
    recipe.write_text("stepz = 1\n")
    assert "unknown field 'stepz'" in refused(capsys, "pretrain", *out, "--recipe", recipe)
    assert not (tmp_path / "new").exists()


def test_a_corpus_that_changed_is_noticed_on_resume(corpus, tmp_path, capsys):
    copy, folder = tmp_path / "corpus.jsonl", tmp_path / "run"
    copy.write_bytes(corpus.read_bytes())
    run("pretrain", "--output", folder, "--corpus", copy, *RECIPE_FLAGS)
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join(reversed(lines)))  # as many tokens, in another order
    capsys.readouterr()
    line = refused(capsys, "pretrain", "--output", folder, "--resume")
    assert "step-00000012: was saved with other data: corpus or records" in line


def test_ctrl_c_outside_training_is_one_line(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fuseformer.tuning.commands.load_tuned", interrupted)
    assert main(["generate", "run", "text"]) == 130
    assert capsys.readouterr().err == "fuseformer generate: interrupted\n"


def test_a_record_longer_than_the_model_is_refused_or_cut(pretrained, tmp_path, capsys):
    record = {"instruction": "Which?", "input": "fox " * 60, "output": "a", "task": "t"}
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(record) + "\n")
    flags = ("--model", pretrained, "--records", path, "--steps", 2)
    line = refused(capsys, "tune", *flags, "--output", tmp_path / "a")
    assert "long.jsonl, line 1: a prompt of" in line
    assert "the model takes 49 in all" in line
    run("tune", *flags, "--output", tmp_path / "b", "--truncation", "input")


def test_what_is_named_is_looked_for_before_anything_long(corpus, records, tmp_path, capsys):
    out, none = ("--output", tmp_path / "new"), tmp_path / "none.jsonl"
    for command, flags in (
        ("tune", ("--records", records, "--held-out", none)),
        ("tune", ("--records", records, none)),
        ("pretrain", ("--corpus", corpus, "--held-out", none)),
        ("pretrain", ("--corpus", corpus, none)),
    ):
        assert f"{none}: cannot be read (No such file" in refused(capsys, command, *out, *flags)
    flags = ("--records", records, "--held-out", corpus)
    assert 'corpus.jsonl, line 1: field "instruction"' in refused(capsys, "tune", *out, *flags)
    assert "it is a folder" in refused(capsys, "tune", *out, "--records", tmp_path)
    line = refused(capsys, "pretrain", *out, "--records", records)
    assert "records: pretraining reads documents" in line
    line = refused(capsys, "pretrain", "--output", records / "run", "--corpus", corpus)
    assert "records.jsonl is a file, expected a folder" in line
    line = refused(capsys, "evaluate", tmp_path / "no run", "--records", none)
    assert f"records: {none}: cannot be read" in line
    assert not (tmp_path / "new").exists()


def test_relative_names_hold_from_any_folder(corpus, records, tmp_path, monkeypatch, capsys):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    shutil.copy(corpus, there / "mine.jsonl")
    shutil.copy(records, there / "judge.jsonl")
    (there / "mine.toml").write_text('corpus = ["mine.jsonl"]\nsteps = 2\nsave_every = 1\n')
    sizes = ("--width", 16, "--heads", 2, "--layers", 1, "--hidden", 24, "--max-length", 48)
    monkeypatch.chdir(there)
    flags = ("--held-out", "judge.jsonl", "--vocab-size", 300, *sizes)
    run("pretrain", "--output", "run", "--recipe", "mine.toml", *flags)
    monkeypatch.chdir(elsewhere)
    recipe = ("--recipe", there / "mine.toml", *flags[2:])
    run("pretrain", "--output", "second", *recipe)
    monkeypatch.chdir(tmp_path)
    run("pretrain", "--output", there / "run", "--resume", "--held-out", "there/judge.jsonl")
    shutil.copytree(Run(there / "run").latest(), elsewhere / "best")
    capsys.readouterr()
    run("evaluate", elsewhere / "best")  # by what its run names, and not by Python's documentation
    assert "classification perplexity" in capsys.readouterr().out


def test_a_checkpoint_without_a_recipe_is_not_judged_by_anything_at_hand(
    pretrained, records, tmp_path, capsys
):
    shutil.copytree(Run(pretrained).latest(), tmp_path / "copy")
    (tmp_path / "copy" / "recipe.toml").unlink()
    capsys.readouterr()
    line = refused(capsys, "evaluate", tmp_path / "copy")
    assert "lies outside of its run" in line
    assert "pass --records FILE" in line
    run("evaluate", tmp_path / "copy", "--records", records)


def test_one_long_answer_does_not_abort_an_evaluation(pretrained, tmp_path, capsys):
    path, figures = tmp_path / "some.jsonl", tmp_path / "figures.json"
    answers = ["fox", "dog " * 60, "owl"]
    path.write_text(
        "".join(
            json.dumps({"instruction": "Which?", "input": text, "output": answer, "task": "t"})
            + "\n"
            for text, answer in zip(("a", "b", "fox " * 60), answers, strict=True)
        )
    )
    capsys.readouterr()
    run("evaluate", pretrained, "--records", path, "--json", figures)
    out, err = capsys.readouterr()
    assert "t: texts were split by words for rouge_l, token_f1" in out
    assert "t: 1 of 2 lost the end of their input; the model takes 48 tokens" in err
    assert "t: 1 of 3 records left out: " in err
    assert "some.jsonl, line 2: a prompt of" in err
    found = json.loads(figures.read_text())
    assert found["records"] == {"t": {"judged": 2, "shortened": 1, "left_out": 1}}
    assert found["tokenisers"]["t"]["token_f1"] == "words"


def test_a_prompt_from_a_file_loses_its_byte_order_mark(pretrained, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffthe quick\n"))
    run("generate", pretrained, "--max-new-tokens", 1)
    assert capsys.readouterr().out.startswith("the quick")


def test_a_flag_given_twice_adds_files(pretrained, records, tmp_path, capsys):
    capsys.readouterr()
    figures = tmp_path / "figures.json"
    run("evaluate", pretrained, "--records", records, "--records", records, "--json", figures)
    assert json.loads(figures.read_text())["records"]["classification"]["judged"] == 80


def test_generation_cuts_as_training_did_and_says_so(pretrained, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    record = {"instruction": "Which?", "input": "fox " * 60, "output": "a", "task": "t"}
    path.write_text(json.dumps(record) + "\n")
    flags = ("--model", pretrained, "--records", path, "--steps", 1, "--truncation", "input")
    run("tune", *flags, "--output", tmp_path / "cut")
    assert "records: 1 of 1 lost the end of their input" in capsys.readouterr().err
    asked = ("--instruction", "Which?", "--input", "fox " * 60)
    run("generate", tmp_path / "cut", *asked)
    assert "of 240 characters were left out" in capsys.readouterr().err
    line = refused(capsys, "generate", pretrained, *asked)
    assert "instruction: a prompt of" in line
    assert "shorten it, or take a run tuned with --truncation input" in line


def test_a_lower_rate_may_be_taken_on_resume(corpus, tmp_path, capsys, monkeypatch):
    from fuseformer.tuning.objectives import weighted_loss

    def diverging(*arguments):
        loss, weight = weighted_loss(*arguments)
        return loss * float("nan"), weight

    folder = tmp_path / "run"
    flags = ("pretrain", "--output", folder)
    run(*flags, "--corpus", corpus, *RECIPE_FLAGS)
    shutil.rmtree(Run(folder).latest())  # 9 steps are left
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("fuseformer.tuning.train.weighted_loss", diverging)
        assert main([str(a) for a in (*flags, "--resume")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    advice = re.search(r"step-00000009 with --resume and .*--learning-rate (\S+)", line)
    assert advice is not None, line
    run(*flags, "--resume", "--learning-rate", advice[1])
    assert "learning_rate: 0.01 until now, 0.0025 from here" in capsys.readouterr().err
    assert Run(folder).recipe.learning_rate == 0.0025
    assert Run(folder).latest().name == "step-00000012"


def test_damaged_checkpoints_are_named(pretrained, tmp_path, capsys):
    for name, damage in (
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-7])),
        ("config.json", lambda path: path.write_text('{"kind": "something else"}')),
        ("tokenizer.json", lambda path: path.write_text("{}")),
        ("model.safetensors", lambda path: path.unlink()),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(pretrained, copy)
        damage(Run(copy).latest() / name)
        assert name in refused(capsys, "generate", copy, "the", "--max-new-tokens", 2)
        shutil.rmtree(copy)


def test_output_that_cannot_be_written_is_no_traceback(pretrained):
    program = [sys.executable, "-m", "fuseformer_command"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*program, "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "fuseformer info: [Errno 28] No space left on device\n"
    pipe = subprocess.Popen([*program, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipe.stdout.close()
    assert b"Traceback" not in pipe.stderr.read()
    assert pipe.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "RUN", "\udcff"), "surrogates not allowed"),
        (("generate", "RUN", "a", "--max-new-tokens", 0), "max_new_tokens: got 0"),
        (("generate", "RUN", "a", "--instruction", "b"), "prompt: got one besides"),
        (("generate", "RUN", "a", "--input", "b"), "input: expected together"),
        (("evaluate", "RUN", "--limit", -1), "limit: got -1"),
        (("evaluate", "RUN", "--max-new-tokens", 0), "max_new_tokens: got 0"),
        (("tune", "--model", "RUN", "--output", "x", "--corpus", "c"), "corpus: tuning reads"),
        (("tune", "--model", "RUN", "--output", "x", "--resume"), "model: a resumed run"),
        (("pretrain", "--output", "x", "--width", 10**9, "--corpus", "CORPUS"), "memory"),
    ],
)
def test_arguments_that_would_be_dropped_or_fail_later_are_refused(
    arguments, message, pretrained, corpus, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names = {"RUN": pretrained, "CORPUS": corpus}
    assert message in refused(capsys, *(names.get(a, a) for a in arguments))


def test_odd_records_are_named_by_line(tmp_path, capsys):
    path = tmp_path / "odd.jsonl"
    for odd in (
        "[" * 100_000,
        '{"instruction": "\\ud800", "output": "b", "task": "c"}',
        "9" * 5000,
    ):
        path.write_text(odd + "\n")
        line = refused(capsys, "tune", "--output", tmp_path / "new", "--records", path)
        assert "odd.jsonl, line 1: " in line
        line = refused(capsys, "pretrain", "--output", tmp_path / "new", "--corpus", path)
        assert "odd.jsonl, line 1: " in line


def test_a_checkpoint_outside_its_run_says_itself_what_it_is(corpus, records, tmp_path, capsys):
    flags = ("--objective", "seq2seq", *RECIPE_FLAGS)
    run("pretrain", "--corpus", corpus, "--output", tmp_path / "run", *flags)
    shutil.copytree(Run(tmp_path / "run").latest(), tmp_path / "alone")
    capsys.readouterr()
    run("evaluate", tmp_path / "alone", "--records", records)
    assert "classification accuracy" in capsys.readouterr().out
    # A source and its target have positions of their own.
    run("generate", tmp_path / "alone", "the fox " * 6, "--max-new-tokens", 40)


def test_one_label_is_no_choice(pretrained, tmp_path, capsys):
    record = {"instruction": "Which?", "input": "fox", "output": "a", "task": "classification"}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    run("evaluate", pretrained, "--records", path)
    out = capsys.readouterr().out
    assert "classification perplexity" in out
    assert "accuracy" not in out


def test_a_traceback_is_shown_where_it_is_asked_for():
    with pytest.raises(ValueError, match="no such folder"):
        main(["--traceback", "generate", "nowhere", "text"])
