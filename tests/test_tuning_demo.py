"""The quick demonstration, run once, and the parts of its report."""

import base64
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from tiny_runs import RECIPE, texts

from fuseformer.models import CausalLM, pack_ids
from fuseformer.models.plain import PlainModel
from fuseformer.tuning.attention_map import AttentionMap, attention_maps, sharpest_map
from fuseformer.tuning.batches import causal_example
from fuseformer.tuning.comparison import Comparison, compare_with_torch
from fuseformer.tuning.demo import FULL, MARK, QUICK, run_demo
from fuseformer.tuning.plots import running_mean
from fuseformer.tuning.report import Example, Row, table, write_report
from fuseformer.tuning.runs import Run, load_tuned
from fuseformer.tuning.tasks import DEFAULT_TASKS
from fuseformer.tuning.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder and the printed text of `fuseformer demo --quick`, run a second time over one."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / MARK).touch()
    (folder / "pretrain").mkdir()
    (folder / "pretrain" / "recipe.toml").write_text("steps = 1\n")
    (folder / "pretrain" / "metrics.jsonl").write_text("left behind by an earlier one\n")
    command = [
        sys.executable,
        "-m",
        "fuseformer_command",
        "demo",
        "--quick",
        "--output",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_table_has_every_task_before_and_after(demo):
    _, text = demo
    for task in DEFAULT_TASKS:
        assert re.search(rf"^{task} +perplexity +[\d.]+ +[\d.]+ +better$", text, re.M)
    for metric in ("bleu", "rouge_l", "token_f1", "exact_match", "accuracy"):
        assert metric in text
    accuracy = re.search(r"^classification +accuracy +([\d.]+) +([\d.]+) +([\d.]+)", text, re.M)
    assert accuracy is not None
    assert all(0 <= float(value) <= 100 for value in accuracy.groups())
    assert len(re.findall(r"^    tuned: ", text, re.M)) == 2 * len(DEFAULT_TASKS)
    assert "as fast as torch.nn's" in text


def test_runs_of_others_are_left_alone(tmp_path):
    notes = tmp_path / "tune" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(ValueError, match=r"output: .*tune is not from a demonstration"):
        run_demo(tmp_path, quick=True)
    assert notes.read_text() == "mine"
    (tmp_path / MARK).touch()  # nor what lies beside the files of a demonstration's run
    with pytest.raises(ValueError, match=r"output: .*tune holds notes.txt, which no run has"):
        run_demo(tmp_path, quick=True)
    assert notes.read_text() == "mine"


def test_its_runs_serve_the_other_commands(demo):
    folder, _ = demo
    for name, recipe in (("pretrain", QUICK.pretrain), ("tune", QUICK.tune)):
        run = Run(folder / name)
        assert run.recipe == recipe
        assert len(run.read_log()) == recipe.steps
        model, tokenizer, _ = load_tuned(folder / name)
        assert model.config.vocab_size == tokenizer.vocab_size


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_whole_page(demo):
    folder, text = demo
    content = (folder / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(content)
    assert page.open == []
    assert len(page.images) == 3
    for source in page.images:
        data = source.removeprefix("data:image/png;base64,")
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert page.links == page.images  # nothing is fetched from elsewhere
    assert "varlen_attention" in content  # which backend ran
    assert "the tensors are on the cpu" in content
    for task in DEFAULT_TASKS:
        assert task.replace("_", " ") in content
    assert "<script" not in content
    assert str(folder / "report.html") in text


def test_a_text_cannot_break_the_report(tmp_path):
    hostile = "</td><script>alert(1)</script> & $x_1^2$ 中文"
    write_report(
        tmp_path / "report.html",
        title=hostile,
        summary=hostile,
        counts=hostile,
        rows=[Row("task", "bleu", 1.0, 2.0)],
        curves={"pretrain": [3.0, 2.0], "tune": []},
        examples=[Example(hostile, hostile, hostile, hostile, hostile)],
        attention=AttentionMap(0, 0, torch.eye(2), [hostile, "$"]),
        comparison=Comparison(1.0, 2.0, 2.0, 10, 20, 5, hostile),
        facts=[(hostile, hostile)],
    )
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(content)
    assert page.open == []
    assert "<script" not in content
    assert "&lt;script&gt;alert(1)" in content


def test_full_and_quick_differ_in_size_alone():
    for full, quick in ((FULL.pretrain, QUICK.pretrain), (FULL.tune, QUICK.tune)):
        assert quick.steps < full.steps
        assert (full.objective, full.weighting) == (quick.objective, quick.weighting)
    assert FULL.held_out_per_task > QUICK.held_out_per_task


def small_model(dropout=0.0, layers=2):
    tokenizer = Tokenizer.train(texts(), 300)
    torch.manual_seed(0)
    config = replace(RECIPE, dropout=dropout, layers=layers).model_config(tokenizer.vocab_size)
    return CausalLM(config), tokenizer


def test_the_comparison_is_of_the_same_loss(monkeypatch):
    model, tokenizer = small_model(dropout=0.1)
    ids = [tokenizer.encode(text)[:40] for text in texts(5)]
    examples = [causal_example(tokens[: 9 + 6 * i]) for i, tokens in enumerate(ids)]
    result = compare_with_torch(model, examples, repetitions=2)
    assert result.tokens == sum(example.tokens for example in examples)
    assert result.padded_tokens == 5 * max(example.tokens for example in examples)
    assert result.supervised == result.tokens
    assert result.fused_seconds > 0
    assert "linear_cross_entropy" in result.decisions

    right = PlainModel.loss
    monkeypatch.setattr(PlainModel, "loss", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(RuntimeError, match="the models disagree"):
        compare_with_torch(model, examples, repetitions=1)


def test_attention_maps_are_the_softmax_of_that_block():
    model, tokenizer = small_model()
    model.double()
    ids = tokenizer.encode(texts()[0])[:12]
    maps = attention_maps(model, ids, 1)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
    assert maps.triu(1).eq(0).all()
    model.eval()
    packed, positions, where = pack_ids([ids])
    with torch.no_grad():
        x = model.blocks.blocks()[0](model.embedding(packed, positions), where, True)
        q, k, _ = model.blocks.blocks()[1].attention.project(x)
    logits = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(maps, torch.softmax(logits, -1).to(maps.dtype))
    shown = sharpest_map(model, tokenizer, [tokenizer.bos_id, *ids])
    assert shown.weights.shape == (13, 13)
    assert shown.tokens[0] == "·"
    assert "".join(shown.tokens[1:]) == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="layer: got 2"):
        attention_maps(model, ids, 2)


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("perplexity", 9.0, 3.0, "better"),
        ("perplexity", 3.0, 9.0, "worse"),
        ("bleu", 3.0, 9.0, "better"),
        ("bleu", 9.0, 3.0, "worse"),
        ("bleu", 3.0, 3.0, "same"),
    ],
)
def test_better_means_lower_perplexity_and_higher_everything_else(metric, before, after, verdict):
    row = Row("t", metric, before, after, 1.0)
    assert row.verdict == verdict
    assert re.search(rf"{before} +{after} +1\.0  {verdict}$", table([row]))


def test_running_means():
    assert running_mean([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]
    assert running_mean([], 3) == []
