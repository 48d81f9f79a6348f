"""What the commands `pretrain`, `tune`, `evaluate` and `generate` do with their arguments."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fuseformer.files import write_atomically
from fuseformer.models.config import ModelConfig
from fuseformer.models.language_model import TokenModel
from fuseformer.models.modes import evaluating
from fuseformer.tuning.batches import PackedSampler
from fuseformer.tuning.evaluation import evaluate
from fuseformer.tuning.instructions import (
    DEFAULT_TEMPLATE,
    IGNORE_INDEX,
    read_records,
)
from fuseformer.tuning.language_model import TunedModel
from fuseformer.tuning.metrics import perplexity
from fuseformer.tuning.objectives import Objective, make_objective, objective_of
from fuseformer.tuning.ownership import check_single_process, owned
from fuseformer.tuning.recipe import Recipe, differences, merged
from fuseformer.tuning.runs import Run, load_tuned
from fuseformer.tuning.signals import StopRequest
from fuseformer.tuning.sources import corpus_texts, held_out_records, training_records
from fuseformer.tuning.tokenizer import Tokenizer
from fuseformer.tuning.train import Outcome, resolve_device, train

#: What `generate` writes at most, unless told otherwise.
NEW_TOKENS = 60
#: Small models loop when they answer greedily; they are judged without (`models.generate`).
JUDGED_NO_REPEAT = 3
AnyModel = TypeVar("AnyModel", bound=TokenModel)
_MODEL_FIELDS = tuple(spec.name for spec in fields(ModelConfig))


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> nn.Module:
    """Return a model of the recipe's kind and sizes, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return make_objective(recipe, tokenizer).new_model(
        recipe.model_config(vocab_size=tokenizer.vocab_size)
    )


def with_dropout(model: AnyModel, dropout: float) -> AnyModel:
    """Return a model of the same weights that trains with another dropout probability."""
    if model.config.dropout == dropout:
        return model
    made = type(model)(replace(model.config, dropout=dropout)).to(model.device)
    made.load_state_dict(model.state_dict())
    return made


def _adopt(recipe: Recipe, model: Any, given: Mapping[str, Any]) -> tuple[Recipe, Any]:
    """Return the recipe with the sizes of a loaded model, and the model with the dropout given.

    Raises `ValueError` where a size that was given is not the model's. `vocab_size` is what a new
    vocabulary would get, and of no consequence here.
    """
    model = with_dropout(model, given.get("dropout", model.config.dropout))
    sizes = {name: getattr(model.config, name) for name in _MODEL_FIELDS}
    for name, value in given.items():
        if name != "vocab_size" and sizes.get(name, value) != value:
            raise ValueError(f"{name}: got {value}, but the model has {sizes[name]}")
    return replace(recipe, **sizes), model


def _new_run(folder: Path, recipe: Recipe) -> Run:
    """Return a run in `folder`, refusing what would be found out minutes later otherwise."""
    run = Run(folder)
    run.check_unused()
    resolve_device(recipe.device)
    return run


def _reopen(folder: Path, given: Mapping[str, Any]) -> tuple[Run, Recipe, Path, Any, Tokenizer]:
    """Return a run to go on with, its recipe, newest checkpoint, model and tokenizer."""
    run = Run(folder)
    checkpoint = run.latest()
    recipe = run.recipe
    changed = differences(recipe, merged(recipe, given, "flags"))
    if changed:
        raise ValueError(
            f"{changed[0]}: a resumed run keeps its recipe, {getattr(recipe, changed[0])!r} here; "
            "leave the flag out, or start a new run"
        )
    model, tokenizer, _ = load_tuned(checkpoint)
    return run, recipe, checkpoint, model, tokenizer


@contextmanager
def _training_in(folder: Path) -> Iterator[StopRequest]:
    """Own the folder of a run, and let signals stop it in good order, from its first line on."""
    check_single_process()
    with StopRequest() as stop, owned(folder):
        yield stop


def pretrain(recipe: Recipe, given: Mapping[str, Any], folder: Path, resume: bool) -> Outcome:
    """Train a new model on plain text, or go on with a run; return where it stopped."""
    with _training_in(folder) as stop:
        return _pretrain(recipe, given, folder, resume, stop)


def _pretrain(
    recipe: Recipe, given: Mapping[str, Any], folder: Path, resume: bool, stop: StopRequest
) -> Outcome:
    checkpoint = None
    if resume:
        run, recipe, checkpoint, model, tokenizer = _reopen(folder, given)
        texts, _ = corpus_texts(recipe)
    else:
        run = _new_run(folder, recipe)
        texts, _ = corpus_texts(recipe)
        tokenizer = Tokenizer.train(texts, recipe.vocab_size)
        model = new_model(recipe, tokenizer)
    objective = make_objective(recipe, tokenizer)
    examples = objective.from_documents(texts)
    return train(
        model,
        tokenizer,
        objective,
        examples,
        recipe,
        run,
        resume=checkpoint,
        stop=stop,
        title="pretrain",
    )


def tune(
    recipe: Recipe,
    given: Mapping[str, Any],
    folder: Path,
    resume: bool,
    base: Path | None,
) -> Outcome:
    """Train a checkpoint, or a new model, on instruction records; return where it stopped."""
    with _training_in(folder) as stop:
        return _tune(recipe, given, folder, resume, base, stop)


def _tune(
    recipe: Recipe,
    given: Mapping[str, Any],
    folder: Path,
    resume: bool,
    base: Path | None,
    stop: StopRequest,
) -> Outcome:
    for name in ("corpus", "held_out_share"):
        if name in given:
            raise ValueError(f"{name}: tuning reads records, not documents; leave it out")
    if resume and base is not None:
        raise ValueError("model: a resumed run goes on from its own checkpoint; leave it out")
    # Records are made of the same text as documents: none of those stays unseen.
    recipe = replace(recipe, held_out_share=0.0)
    checkpoint = None
    if resume:
        run, recipe, checkpoint, model, tokenizer = _reopen(folder, given)
        records = training_records(recipe)
    elif base is not None:
        run = _new_run(folder, recipe)
        model, tokenizer, _ = load_tuned(base)
        recipe, model = _adopt(recipe, model, given)
        records = training_records(recipe)
    else:
        run = _new_run(folder, recipe)
        records = training_records(recipe)
        texts = [t for r in records for t in (r.instruction, r.input, r.output)]
        tokenizer = Tokenizer.train(texts, recipe.vocab_size)
        model = new_model(recipe, tokenizer)
    objective = make_objective(recipe, tokenizer)
    if not isinstance(model, objective.model_class):
        raise ValueError(
            f"objective: {recipe.objective!r} trains a {objective.model_class.__name__}, but "
            f"{base or folder} holds a {type(model).__name__}"
        )
    examples = objective.from_records(records)
    return train(
        model,
        tokenizer,
        objective,
        examples,
        recipe,
        run,
        resume=checkpoint,
        stop=stop,
        title="tune",
    )


def evaluate_run(
    path: Path,
    records: Sequence[Path],
    *,
    limit: int | None,
    max_new_tokens: int,
    output: Path | None,
    device: str,
) -> str:
    """Judge a checkpoint by held-out records; return the table, and write JSON to `output`."""
    for name, number in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        _check_positive(name, number)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"json: got {output}, expected a file in a folder that exists")
    model, tokenizer, folder = load_tuned(path, str(resolve_device(device)))
    recipe = _recipe_of(folder, model)
    metrics: dict[str, dict[str, float]] = {}
    if records and recipe.objective == "masked":
        raise ValueError("records: a masked language model is judged by documents, not by records")
    if not records and not recipe.records and recipe.held_out_share:
        _, texts = corpus_texts(recipe)
        if texts:
            objective = make_objective(recipe, tokenizer)
            value = held_out_perplexity(model, objective, texts)
            metrics["held-out documents"] = {"perplexity": value}
    if recipe.objective != "masked" and not (recipe.corpus and not records):
        held_out = (
            [record for file in records for record in read_records(file)]
            if records
            else held_out_records(recipe)
        )
        tuned = TunedModel(model, tokenizer, no_repeat=JUDGED_NO_REPEAT)
        metrics |= evaluate(
            tuned,
            tokenizer,
            held_out,
            max_length=tuned.max_length,
            max_new_tokens=max_new_tokens,
            generate_limit=limit,
            language=recipe.language,
        ).metrics
    if not metrics:
        remedy = "" if recipe.objective == "masked" else "; pass --records FILE"
        raise ValueError(
            f"{folder}: nothing to judge by: no document was held out of its corpus{remedy}"
        )
    if output is not None:
        text = json.dumps({"checkpoint": str(folder), "metrics": metrics}, indent=1) + "\n"
        write_atomically(output, lambda file: file.write(text.encode()))
    return metrics_table({"": metrics})


def _check_positive(name: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError(f"{name}: got {number}, expected a whole number from 1 up")


def held_out_perplexity(model: Any, objective: Objective, texts: Sequence[str]) -> float:
    """Return the perplexity of what `objective` predicts in documents kept out of training."""
    recipe = objective.recipe
    examples = objective.from_documents(texts)
    sampler = PackedSampler(
        examples,
        tokens_per_batch=max(recipe.tokens_per_batch, recipe.max_length),
        max_length=recipe.max_length,
        shuffle=False,
    )
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        while sampler.position < len(examples):
            batch = next(sampler).to(model.device)
            loss, targets = objective.token_losses(model, batch, "sum")
            total, count = total + float(loss), count + int((targets != IGNORE_INDEX).sum())
    return perplexity(total, count)


def _recipe_of(checkpoint: Path, model: Any) -> Recipe:
    """Return the recipe of the run that a checkpoint lies in, or the defaults outside of one.

    What the model itself says, its kind and sizes, comes from the model.
    """
    folder = checkpoint.resolve().parent.parent
    recipe = Run(folder).recipe if (folder / "recipe.toml").exists() else Recipe()
    sizes = {name: getattr(model.config, name) for name in _MODEL_FIELDS}
    return replace(recipe, objective=objective_of(model), **sizes)


def metrics_table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return evaluations side by side as text, a line a task and metric."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for title, metrics in columns.items():
        for task, values in metrics.items():
            for name, value in values.items():
                rows.setdefault((task, name), {})[title] = value
    width = max((len(f"{task} {name}") for task, name in rows), default=0)
    lines = []
    if any(columns):
        lines.append(" " * width + "".join(f"{title:>12}" for title in columns))
    for (task, name), values in rows.items():
        cells = (f"{values[t]:12.2f}" if t in values else f"{'':12}" for t in columns)
        lines.append(f"{f'{task} {name}':{width}}" + "".join(cells))
    return "\n".join(lines)


def generate_text(
    path: Path,
    *,
    prompt: str | None,
    instruction: str | None,
    input: str,
    max_new_tokens: int | None,
    no_repeat: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str,
) -> str:
    """Return what a checkpoint writes after a prompt, or in answer to an instruction.

    At most `max_new_tokens`, which default to `NEW_TOKENS`, or fewer where the model has less room.
    """
    _check_positive("max_new_tokens", max_new_tokens)
    if instruction is not None and prompt is not None:
        raise ValueError("prompt: got one besides an instruction, expected one of the two")
    if instruction is None and input:
        raise ValueError("input: expected together with an instruction")
    model, tokenizer, _ = load_tuned(path, str(resolve_device(device)))
    tuned = TunedModel(model, tokenizer, no_repeat)
    text = DEFAULT_TEMPLATE.prompt(instruction, input) if instruction is not None else prompt
    if text is None:
        text = sys.stdin.read().rstrip("\n")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(NEW_TOKENS, tuned.room_behind(len(ids))))
    if max_new_tokens > tuned.room_behind(len(ids)):
        raise ValueError(
            f"prompt: got {len(ids)} tokens, behind which the model of {tuned.max_length} has room "
            f"for {max(0, tuned.room_behind(len(ids)))} new ones, not for {max_new_tokens}"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    (new,) = tuned.generate(
        [ids],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    answer = tokenizer.decode(new)
    return answer.strip() if instruction is not None else text + answer
