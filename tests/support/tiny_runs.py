"""Training runs small enough for a test: a made corpus, records, and a model of a few numbers."""

import json
import random
from dataclasses import fields
from pathlib import Path

import torch

from fuseformer.tuning.objectives import make_objective
from fuseformer.tuning.recipe import Recipe
from fuseformer.tuning.runs import Run, load_tuned
from fuseformer.tuning.tokenizer import Tokenizer
from fuseformer.tuning.train import Outcome, train

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "owls",
    "read",
)
RECIPE = Recipe(
    vocab_size=300,
    width=16,
    heads=2,
    layers=1,
    hidden=24,
    max_length=48,
    tokens_per_batch=160,
    steps=12,
    save_every=3,
    warmup_steps=2,
    held_out_share=0.1,
    learning_rate=0.01,
    device="cpu",
)
RECIPE_FLAGS = [
    word
    for spec in fields(Recipe)
    if getattr(RECIPE, spec.name) != getattr(Recipe(), spec.name)
    for word in (f"--{spec.name.replace('_', '-')}", str(getattr(RECIPE, spec.name)))
]


def texts(count: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=14)) for _ in range(count)]


def write_corpus(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


def write_records(path: Path, count: int = 40) -> Path:
    draw = random.Random(1)
    lines = []
    for index in range(count):
        label = ("first", "second")[index % 2]
        word = ("fox", "owl")[index % 2]
        text = f"{word} {draw.choice(WORDS)}"
        lines.append({"instruction": "Which?", "input": text, "output": label})
    for line in lines:
        line["task"] = "classification"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(folder: Path, recipe: Recipe = RECIPE, **options) -> Outcome:
    """Train a new model in `folder`."""
    tokenizer = Tokenizer.train(texts(), recipe.vocab_size)
    objective = make_objective(recipe, tokenizer)
    torch.manual_seed(recipe.seed)
    model = objective.new_model(recipe.model_config(tokenizer.vocab_size))
    examples = objective.from_documents(texts())
    return train(model, tokenizer, objective, examples, recipe, Run(folder), **options)


def resume(folder: Path) -> Outcome:
    """Go on with the run in `folder`."""
    run = Run(folder)
    recipe = run.recipe
    model, tokenizer, checkpoint = load_tuned(folder)
    objective = make_objective(recipe, tokenizer)
    examples = objective.from_documents(texts())
    return train(model, tokenizer, objective, examples, recipe, run, resume=checkpoint)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in Run(folder).read_log()]
