"""The training loop: packed batches, AdamW, and a run that survives what may happen to it."""

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fuseformer.tuning.batches import PackedBatch, PackedSampler
from fuseformer.tuning.objectives import Objective, weighted_loss
from fuseformer.tuning.recipe import Recipe
from fuseformer.tuning.runs import CheckpointError, Run
from fuseformer.tuning.signals import StopRequest
from fuseformer.tuning.tokenizer import Tokenizer


class NonFiniteLossError(ValueError):
    """A loss or gradient that is infinite or not a number; the message names the checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """Where training stopped, and the signal that stopped it before its last step, or ""."""

    step: int
    checkpoint: Path
    signal: str


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of `step`, counted from 0: a linear rise, then a half cosine to the end.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * share)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) that decays matrices and leaves vectors alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True
    )


def resolve_device(name: str) -> torch.device:
    """Return the device of a recipe; raises `ValueError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ValueError(f"device: got {name!r}, but PyTorch sees {there} of {device.type}")
    return device


def _train_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[PackedBatch],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """Take one step on `batches`; return the mean loss and the gradient's norm before clipping.

    The optimizer does not move where either is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    device = batches[0].input_ids.device
    total, weight = torch.zeros((), device=device), 0.0
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            loss, count = weighted_loss(objective, model, batch, recipe.weighting)
        loss.backward()
        total, weight = total + loss.detach(), weight + count
    # The mean over all tokens of the step, not the mean of means: batches differ in size.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_div_(gradients, max(weight, 1.0))
    norm = torch.nn.utils.get_total_norm(gradients)
    mean = total / max(weight, 1.0)
    if bool(torch.isfinite(mean)) and bool(torch.isfinite(norm)):
        if recipe.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.clip_norm, norm)
        optimizer.step()
    return mean, norm


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    objective: Objective,
    examples: Sequence[Any],
    recipe: Recipe,
    run: Run,
    *,
    resume: Path | None = None,
    stop: StopRequest | None = None,
    title: str = "training",
    advice: str = "go on with --resume",
) -> Outcome:
    """Train `model` on `examples` as `recipe` says, keeping log and checkpoints in a new `run`.

    `resume` is the checkpoint of this run whose weights `model` has: its optimizer, data order and
    random generators go on as if nothing had happened, so that on a CPU the losses are the same to
    the last bit. SIGTERM and SIGINT save, say so with `advice`, and return; so does one that `stop`
    has caught before: even then there is a checkpoint to resume from.

    Raises `NonFiniteLossError` for a loss or gradient that is not finite, with the weights as they
    were before that step, `CheckpointError` where a checkpoint cannot be written or belongs to
    other data, and `ValueError` for examples that do not fit.
    """
    device = resolve_device(recipe.device)
    model.to(device).train()
    optimizer = make_optimizer(model, recipe)
    sampler = PackedSampler(
        examples,
        tokens_per_batch=recipe.tokens_per_batch,
        max_length=recipe.max_length,
        seed=recipe.seed,
    )
    step = tokens = 0
    if resume is None:
        run.create(recipe)
        torch.manual_seed(recipe.seed)
        last = None
    else:
        numbers = run.restore(resume, optimizer)
        step, tokens, last = numbers["step"], numbers["tokens"], resume
        if numbers["data"] != sampler.fingerprint():
            raise CheckpointError(
                f"{resume}: was saved with other data: corpus or records have changed since; "
                "start a new run"
            )
        sampler.load_state_dict(numbers["sampler"])
        run.write_recipe(recipe)  # a rate may have been changed
    run.rewind_log(step)
    data, saved = sampler.fingerprint(), step

    def save() -> Path:
        numbers = {"tokens": tokens, "data": data, "sampler": sampler.state_dict()}
        return run.save(step, model, tokenizer, optimizer, numbers, recipe.keep)

    bar = tqdm(
        total=recipe.steps,
        initial=step,
        desc=title,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    with StopRequest() if stop is None else contextlib.nullcontext(stop) as stop, bar:
        while step < recipe.steps and not stop.name:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            batches = [next(sampler).to(device) for _ in range(recipe.accumulation)]
            loss, norm = (
                float(x) for x in _train_step(model, objective, batches, optimizer, recipe)
            )
            if not (math.isfinite(loss) and math.isfinite(norm)):
                begin = f"go on from {last} with --resume and" if last else "begin anew with"
                raise NonFiniteLossError(
                    f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}; {begin} "
                    f"a lower rate, such as --learning-rate {recipe.learning_rate / 4:g}"
                )
            step += 1
            seen = sum(batch.tokens for batch in batches)
            tokens += seen
            seconds = time.perf_counter() - start
            run.write_log(
                [
                    {
                        "step": step,
                        "loss": loss,
                        "gradient_norm": norm,
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "tokens": tokens,
                        "seconds": round(seconds, 4),
                    }
                ]
            )
            bar.set_postfix_str(f"loss {loss:.3f}, {seen / seconds:.0f} tokens/s", refresh=False)
            bar.update()
            if step % recipe.save_every == 0 or step == recipe.steps:
                last, saved = save(), step
        if last is None or saved != step:  # a signal came between two checkpoints
            last = save()
    if step < recipe.steps:
        print(
            f"{stop.name}: stopped after step {step} of {recipe.steps} and saved {last}; " + advice,
            file=sys.stderr,
        )
    return Outcome(step, last, stop.name if step < recipe.steps else "")
