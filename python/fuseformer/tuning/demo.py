"""The demonstration: pretrain, tune, judge before and after, compare, report, in minutes on a CPU.

Every figure comes from this run. The sizes below are what fits the time; what is done is what
`fuseformer pretrain`, `tune` and `evaluate` do with these recipes.
"""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from fuseformer.models.causal_lm import CausalLM
from fuseformer.tuning.attention_map import sharpest_map
from fuseformer.tuning.commands import JUDGED_NO_REPEAT, new_model, with_dropout
from fuseformer.tuning.comparison import compare_with_torch
from fuseformer.tuning.dataset import Split, build_split, mixture
from fuseformer.tuning.evaluation import Evaluation, evaluate
from fuseformer.tuning.instructions import Record
from fuseformer.tuning.language_model import TunedModel
from fuseformer.tuning.objectives import make_objective
from fuseformer.tuning.ownership import check_single_process, owned
from fuseformer.tuning.progress import say
from fuseformer.tuning.prompts import shape_prompt
from fuseformer.tuning.recipe import Recipe
from fuseformer.tuning.recurrent import RecurrentResult, train_recurrent
from fuseformer.tuning.report import Example, comparison_rows, table, write_report
from fuseformer.tuning.runs import Run
from fuseformer.tuning.signals import InterruptedRunError
from fuseformer.tuning.sources import divided
from fuseformer.tuning.tasks import CLASSIFICATION, DEFAULT_TASKS, TRANSLATION
from fuseformer.tuning.tokenizer import Tokenizer
from fuseformer.tuning.train import train


@dataclass(frozen=True)
class Sizes:
    """What the demonstration trains, and how many held-out records it answers."""

    pretrain: Recipe
    tune: Recipe
    held_out_per_task: int
    generate_limit: int
    baseline_seconds: float
    timed_records: int


_SIZES = Recipe(
    width=128,
    layers=3,
    hidden=512,
    max_length=256,
    # Small batches: in minutes, the number of steps is what counts.
    tokens_per_batch=1024,
    save_every=300,
    warmup_steps=50,
    truncation="input",
    device="cpu",
)
# Classification teaches one token a record and the other tasks a sentence: it is shown more often,
# and long answers count less than their length. Translation, too, has short records. More dropout
# than before, as records are few.
_TUNING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "weighting": "root",
    "repeat": (f"{CLASSIFICATION}=4", f"{TRANSLATION}=3"),
    "dropout": 0.2,
    "held_out_share": 0.0,
    "seed": 1,
}
FULL = Sizes(
    pretrain=replace(_SIZES, steps=800, learning_rate=3e-3),
    tune=replace(_SIZES, steps=1350, **_TUNING),
    held_out_per_task=320,
    generate_limit=100,
    baseline_seconds=75.0,
    timed_records=32,
)
_TINY = replace(
    _SIZES, width=32, layers=1, hidden=64, vocab_size=1024, train_per_task=80, warmup_steps=2
)
QUICK = Sizes(
    pretrain=replace(_TINY, steps=12),
    tune=replace(_TINY, steps=8, **_TUNING),
    held_out_per_task=8,
    generate_limit=2,
    baseline_seconds=3.0,
    timed_records=8,
)


class _Clock:
    """Says what begins, and remembers how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


MARK, RUNS, REPORT = ".fuseformer-demo", ("pretrain", "tune"), "report.html"


def _claim(folder: Path) -> None:
    """Make `folder` ready for a new demonstration; raises `ValueError` where others' runs lie."""
    mark = folder / MARK
    for name in (*RUNS, REPORT):
        if (folder / name).exists() and not mark.exists():
            raise ValueError(
                f"output: {folder / name} is not from a demonstration, which would replace it; "
                "name another folder"
            )
    mark.touch()
    for name in RUNS:
        run = Run(folder / name)
        run.manifest.remove_run()
        run.check_unused()


def _spread(records: list[Record], count: int) -> list[Record]:
    """Return about `count` records from all over the list, which is sorted by label."""
    return records[:: max(1, len(records) // count)][:count]


def run_demo(folder: Path, quick: bool = False) -> str:
    """Run the demonstration; return its table and where everything is.

    Leaves the runs `pretrain` and `tune`, which the other commands take, and `report.html` in
    `folder`, in the place of those of an earlier demonstration. Raises `ValueError` as the commands
    do and where `folder` has files that are not a demonstration's, and `InterruptedRunError` where
    a signal ended a stage early.
    """
    check_single_process()
    with owned(folder):
        return _run_demo(folder, QUICK if quick else FULL)


def _run_demo(folder: Path, sizes: Sizes) -> str:
    clock = _Clock()
    begin = time.perf_counter()
    _claim(folder)
    with clock.stage("collecting text"):
        split = build_split(train_per_task=sizes.tune.train_per_task)
        split.held_out = [
            record
            for task in DEFAULT_TASKS
            for record in _spread(split.of_task(task, "held_out"), sizes.held_out_per_task)
        ]
        texts, _ = divided(split.corpus, sizes.pretrain.held_out_share)
        tokenizer = Tokenizer.train(texts, sizes.pretrain.vocab_size)
    model = cast(CausalLM, new_model(sizes.pretrain, tokenizer))

    def examples_of(records: Sequence[Record]) -> list[Any]:
        return list(make_objective(sizes.tune, tokenizer).from_records(records))

    runs = {name: Run(folder / name) for name in RUNS}
    with clock.stage("pretraining"):
        examples = make_objective(sizes.pretrain, tokenizer).from_documents(texts)
        _train(model, tokenizer, examples, sizes.pretrain, runs["pretrain"])
    with clock.stage("judging the pretrained model"):
        before = _judge(model, tokenizer, split, sizes)
    with clock.stage("tuning"):
        records = mixture(split.train, sizes.tune.repeats())
        model = with_dropout(model, sizes.tune.dropout)
        _train(model, tokenizer, examples_of(records), sizes.tune, runs["tune"])
    with clock.stage("judging the tuned model"):
        after = _judge(model, tokenizer, split, sizes)
    with clock.stage("training the LSTM baseline"):
        baseline = train_recurrent(
            split.of_task(CLASSIFICATION),
            split.of_task(CLASSIFICATION, "held_out"),
            tokenizer,
            tokenizer.vocab_size,
            max_seconds=sizes.baseline_seconds,
        )
    with clock.stage("timing against torch.nn"):
        sample = split.train[:: len(split.train) // sizes.timed_records]  # of every task
        comparison = compare_with_torch(model, examples_of(sample))
    rows = comparison_rows(before, after, {CLASSIFICATION: baseline.accuracy})
    shown = _examples(before, after)
    subject = split.of_task(CLASSIFICATION, "held_out")[0]
    subject_ids = shape_prompt(
        *(subject.instruction, subject.input, tokenizer),
        *(TunedModel(model, tokenizer).room, sizes.tune.truncation),
    ).prompt
    write_report(
        folder / REPORT,
        title="A small Transformer, pretrained and tuned on Python's own documentation",
        summary=_summary(model, tokenizer, split, sizes),
        counts=_counts(after, split),
        rows=rows,
        curves={name: [line["loss"] for line in run.read_log()] for name, run in runs.items()},
        examples=shown,
        attention=sharpest_map(model, tokenizer, subject_ids),
        comparison=comparison,
        facts=_facts(clock, baseline, sizes),
    )
    seconds = time.perf_counter() - begin
    lines = [table(rows), ""]
    for example in shown:
        lines += [f"{example.task}: {example.prompt}", f"    wanted:     {example.wanted}"]
        lines += [f"    pretrained: {example.before}", f"    tuned:      {example.after}", ""]
    lines += [
        f"forward and backward on packed tokens: {comparison.speedup:.2f}x as fast as torch.nn's",
        f"report: {folder / 'report.html'}",
        f'try: fuseformer generate {folder / "tune"} --instruction "Translate to French." '
        '--input "Open file"',
        f"{seconds:.0f} seconds in all",
    ]
    return "\n".join(lines)


def _train(
    model: CausalLM, tokenizer: Tokenizer, examples: Sequence[Any], recipe: Recipe, run: Run
) -> None:
    objective = make_objective(recipe, tokenizer)
    outcome = train(
        model,
        tokenizer,
        objective,
        examples,
        recipe,
        run,
        title=run.folder.name,
        advice="a demonstration begins anew",
    )
    if outcome.signal:
        raise InterruptedRunError(outcome.signal)


def _judge(model: CausalLM, tokenizer: Tokenizer, split: Split, sizes: Sizes) -> Evaluation:
    tuned = TunedModel(model, tokenizer, no_repeat=JUDGED_NO_REPEAT)
    result = evaluate(
        tuned,
        tokenizer,
        split.held_out,
        room=tuned.room,
        max_new_tokens=32,
        generate_limit=sizes.generate_limit,
    )
    for line in result.notices(tuned.room):
        say(line)
    return result


def _examples(before: Evaluation, after: Evaluation, per_task: int = 2) -> list[Example]:
    """Return the first held-out records of each task with both answers, unselected."""
    return [
        Example(
            task.replace("_", " "),
            f"{new.record.instruction} {new.record.input}".strip(),
            new.record.output,
            old.text,
            new.text,
        )
        for task in after.answers
        for old, new in list(zip(before.answers[task], after.answers[task], strict=True))[:per_task]
    ]


def _summary(model: CausalLM, tokenizer: Tokenizer, split: Split, sizes: Sizes) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    return (
        f"A causal language model of {parameters:,} parameters ({config.layers} post-LN blocks of "
        f"width {config.width}, {tokenizer.vocab_size:,} tokens) read {len(split.corpus):,} "
        f"documents in {sizes.pretrain.steps:,} steps, and was then tuned in {sizes.tune.steps:,} "
        f"steps on {len(split.train):,} instructions of {len(DEFAULT_TASKS)} tasks, with a loss on "
        "the answers alone, on packed batches."
    )


def _counts(after: Evaluation, split: Split) -> str:
    parts = [
        f"{len(answers)} of {len(split.of_task(task, 'held_out'))} for {task.replace('_', ' ')}"
        for task, answers in after.answers.items()
    ]
    return (
        f"Records answered: {', '.join(parts)}; all of them for perplexity. Both models write "
        f"greedily, no {JUDGED_NO_REPEAT} tokens in a row twice, and classify by the likeliest "
        "label. The LSTM was not pretrained."
    )


def _facts(clock: _Clock, baseline: RecurrentResult, sizes: Sizes) -> list[tuple[str, str]]:
    facts = [(name, f"{seconds:.0f} s") for name, seconds in clock.seconds.items()]
    facts += [
        (
            "LSTM baseline",
            f"{baseline.parameters:,} parameters, at most {sizes.baseline_seconds:.0f} s, best of "
            f"{baseline.epochs} epochs "
            f"({baseline.best_epoch}) by validation, {baseline.validation_accuracy:.1f} % there",
        ),
        ("learning rates", f"{sizes.pretrain.learning_rate:g}, then {sizes.tune.learning_rate:g}"),
        ("dropout", f"{sizes.pretrain.dropout:g}, then {sizes.tune.dropout:g}"),
        ("records of a task shown more often", ", ".join(sizes.tune.repeat)),
        ("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("Python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.machine()}"),
    ]
    return facts
