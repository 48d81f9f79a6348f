"""What the commands `pretrain`, `tune`, `evaluate` and `generate` do with their arguments."""

import json
import os
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
from fuseformer.tuning.evaluation import Evaluation, evaluate
from fuseformer.tuning.instructions import IGNORE_INDEX, read_records
from fuseformer.tuning.language_model import TunedModel
from fuseformer.tuning.manifest import RECIPE
from fuseformer.tuning.metrics import perplexity
from fuseformer.tuning.objectives import Objective, make_objective, objective_of
from fuseformer.tuning.ownership import check_single_process, owned
from fuseformer.tuning.progress import say
from fuseformer.tuning.prompts import shape_prompt
from fuseformer.tuning.readers import check_readable
from fuseformer.tuning.recipe import RESUMABLE, Recipe, differences, merged, read_recipe
from fuseformer.tuning.runs import Run, load_tuned
from fuseformer.tuning.signals import StopRequest
from fuseformer.tuning.sources import (
    check_sources,
    corpus_texts,
    held_out_records,
    training_records,
)
from fuseformer.tuning.tokenizer import Tokenizer
from fuseformer.tuning.train import Outcome, resolve_device, train

#: What `generate` writes at most, unless told otherwise.
NEW_TOKENS = 60
FULL = "the model has no room for more"
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
    check_sources(recipe)
    return run


def _check_writable(name: str, folder: Path) -> None:
    """Raise `ValueError` where `folder` is not one that can be written to, or made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{name}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: {there} cannot be written to (Permission denied)")


def _reopen(folder: Path, given: Mapping[str, Any]) -> tuple[Run, Recipe, Path, Any, Tokenizer]:
    """Return a run to go on with, its recipe, newest checkpoint, model and tokenizer."""
    run = Run(folder)
    checkpoint = run.latest()
    recipe = run.recipe
    wanted = merged(recipe, given, "flags")
    changed = differences(recipe, wanted)
    for name in changed:
        if name not in RESUMABLE:
            raise ValueError(
                f"{name}: a resumed run keeps its recipe, {getattr(recipe, name)!r} here; "
                f"leave the flag out, or start a new run (only {', '.join(RESUMABLE)} may change)"
            )
    resolve_device(wanted.device)
    check_sources(wanted)
    model, tokenizer, _ = load_tuned(checkpoint)
    for name in changed:
        say(f"{name}: {getattr(recipe, name)} until now, {getattr(wanted, name)} from here")
    return run, wanted, checkpoint, model, tokenizer


@contextmanager
def _training_in(folder: Path) -> Iterator[StopRequest]:
    """Own the folder of a run, and let signals stop it in good order, from its first line on."""
    check_single_process()
    _check_writable("output", folder)
    with StopRequest() as stop, owned(folder):
        yield stop


def pretrain(recipe: Recipe, given: Mapping[str, Any], folder: Path, resume: bool) -> Outcome:
    """Train a new model on plain text, or go on with a run; return where it stopped."""
    with _training_in(folder) as stop:
        return _pretrain(recipe, given, folder, resume, stop)


def _pretrain(
    recipe: Recipe, given: Mapping[str, Any], folder: Path, resume: bool, stop: StopRequest
) -> Outcome:
    for name in ("records", "repeat"):
        if name in given:
            raise ValueError(f"{name}: pretraining reads documents, not records; leave it out")
    checkpoint = None
    if resume:
        run, recipe, checkpoint, model, tokenizer = _reopen(folder, given)
        texts = corpus_texts(recipe)[0]
    else:
        run = _new_run(folder, recipe)
        texts = corpus_texts(recipe)[0]
        tokenizer = Tokenizer.train(texts, recipe.vocab_size)
        model = new_model(recipe, tokenizer)
    objective = make_objective(recipe, tokenizer)
    examples = objective.from_documents(texts)
    del texts  # they may be as large as everything that training needs
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
    if recipe.objective == "masked":
        raise ValueError(
            "objective: a masked language model cannot answer instructions; use causal or seq2seq"
        )
    checkpoint = model = None
    if resume:
        run, recipe, checkpoint, model, tokenizer = _reopen(folder, given)
    else:
        run = _new_run(folder, recipe)
    if base is not None:
        model, tokenizer, _ = load_tuned(base)
        recipe, model = _adopt(recipe, model, given)
    if model is not None and objective_of(model) != recipe.objective:
        raise ValueError(
            f"objective: got {recipe.objective!r}, but {base or folder} holds a "
            f"{type(model).__name__}, which learns {objective_of(model)!r}"
        )
    records = training_records(recipe)
    if model is None:
        texts = [t for r in records for t in (r.instruction, r.input, r.output)]
        tokenizer = Tokenizer.train(texts, recipe.vocab_size)
        del texts
        model = new_model(recipe, tokenizer)
    objective = make_objective(recipe, tokenizer)
    examples = objective.from_records(records)
    del records
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
    tokenise: str,
) -> str:
    """Judge a checkpoint by held-out records; return the table, and write JSON to `output`.

    What does not fit the model is counted and said.
    """
    for name, number in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        _check_positive(name, number)
    if output is not None:
        if output.is_dir() or not output.parent.is_dir():
            raise ValueError(f"json: got {output}, expected a file in a folder that exists")
        _check_writable("json", output.parent)
    check_readable("records", records)
    held_out = [record for file in records for record in read_records(file)]
    model, tokenizer, folder = load_tuned(path, str(resolve_device(device)))
    recipe = _recipe_of(folder, model, judged_by_it=not records)
    metrics: dict[str, dict[str, float]] = {}
    if records and recipe.objective == "masked":
        raise ValueError("records: a masked language model is judged by documents, not by records")
    own = not records and recipe.objective != "masked"
    if own and (recipe.held_out or not recipe.corpus):
        held_out = held_out_records(recipe)
    if not records and not recipe.records and recipe.held_out_share:
        _, texts = corpus_texts(recipe)
        if texts:
            objective = make_objective(recipe, tokenizer)
            value = held_out_perplexity(model, objective, texts)
            metrics["held-out documents"] = {"perplexity": value}
    result = Evaluation()
    if held_out:
        tuned = TunedModel(model, tokenizer, no_repeat=JUDGED_NO_REPEAT)
        result = evaluate(
            tuned,
            tokenizer,
            held_out,
            room=tuned.room,
            max_new_tokens=max_new_tokens,
            generate_limit=limit,
            tokenise=tokenise,
        )
        for line in result.notices(tuned.room):
            say(line)
        metrics |= result.metrics
    if not metrics:
        remedy = "" if recipe.objective == "masked" else "; pass --records FILE"
        raise ValueError(
            f"{folder}: nothing to judge by: no document was held out of its corpus{remedy}"
        )
    if output is not None:
        content = {"checkpoint": str(folder), "metrics": metrics, **_details(result)}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(output, lambda file: file.write(text.encode()))
    return "\n".join([metrics_table({"": metrics}), *_tokenisers(result)])


def _details(result: Evaluation) -> dict[str, Any]:
    """Return what JSON says besides the metrics: what fitted, and how texts were split."""
    records = {
        task: {
            "judged": fit.judged,
            "shortened": fit.shortened,
            "left_out": len(fit.problems),
        }
        for task, fit in result.fit.items()
    }
    return {"records": records, "tokenisers": result.tokenisers}


def _tokenisers(result: Evaluation) -> list[str]:
    """Return a line for each task that says what its metrics count."""
    lines = []
    for task, names in result.tokenisers.items():
        for used in dict.fromkeys(names.values()):
            counting = ", ".join(name for name, own in names.items() if own == used)
            lines.append(f"{task}: texts were split by {used} for {counting}")
    return lines


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


def _recipe_of(checkpoint: Path, model: Any, judged_by_it: bool = False) -> Recipe:
    """Return the recipe in a checkpoint, or of the run that it lies in, or the defaults.

    What the model itself says, its kind and sizes, comes from the model. Raises `ValueError` where
    there is no recipe and the model is to be `judged_by_it`.
    """
    folder = checkpoint.resolve()
    files = [folder / RECIPE]
    if folder.parent.name == "checkpoints":  # one of before recipes were kept with checkpoints
        files.append(folder.parent.parent / RECIPE)
    found = next((file for file in files if file.exists()), None)
    if found is None and judged_by_it:
        raise ValueError(
            f"{checkpoint}: lies outside of its run, so that what to judge it by is not known; "
            "pass --records FILE"
        )
    recipe = Recipe() if found is None else read_recipe(found)[0]
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
    model, tokenizer, folder = load_tuned(path, str(resolve_device(device)))
    tuned = TunedModel(model, tokenizer, no_repeat)
    if instruction is not None:
        truncation = _recipe_of(folder, model).truncation
        shaped = shape_prompt(instruction, input, tokenizer, tuned.room, truncation)
        if shaped.problem:
            raise ValueError(shaped.problem)
        if shaped.lost:
            say(f"input: the last {shaped.lost} of {len(input)} characters were left out; {FULL}")
        text, ids = "", shaped.prompt
    else:
        text = sys.stdin.read().rstrip("\n") if prompt is None else prompt
        text = text.removeprefix("\ufeff")  # the mark that some editors put before a text
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    room = tuned.room.for_new_tokens(len(ids))
    if room < (max_new_tokens or 1):
        raise ValueError(
            f"prompt: got {len(ids)} tokens, behind which the model of {tuned.room.max_length} has "
            f"room for {room} new ones, not for {max_new_tokens or 1}"
        )
    if max_new_tokens is None:
        max_new_tokens = min(NEW_TOKENS, room)
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
