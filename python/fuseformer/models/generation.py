"""Continuing prompts: greedy, or drawn with temperature, top-k and top-p."""

import itertools
import math

import torch
from torch import Tensor

from .blocks import Sequences
from .causal_lm import CausalLM


def restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the probabilities (N, V) to draw from.

    Divides `logits` by `temperature`, keeps the `top_k` likeliest tokens, then the fewest whose
    probability reaches `top_p`; the likeliest token always stays.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, for top-p.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = torch.softmax(logits, -1)
    if top_p is not None:
        ordered, index = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # what comes before is already enough
        probabilities = torch.zeros_like(ordered).scatter(-1, index, ordered.masked_fill(beyond, 0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or a number above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected a whole number from 1 up")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a number above 0, at most 1")


def generate(
    model: CausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    end_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, without the prompt and without `end_id`.

    A `temperature` of 0 takes the likeliest token. Each continuation ends at `end_id` or after
    `max_new_tokens`. The model keeps its training mode, and draws no dropout meanwhile. Raises
    `ValueError` for an empty prompt, a sequence too long for the model, or options out of range.
    """
    _check(temperature, top_k, top_p)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = model.embedding.tokens.weight.device
    lengths = [len(prompt) for prompt in prompts]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    results: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        where = Sequences(cu_seqlens, max(lengths))
        hidden, cache = model.prefill(input_ids.long(), positions, where, max_new_tokens)
        for count in range(max_new_tokens):
            logits = model.logits(hidden)  # (N, V)
            if temperature == 0:
                chosen = logits.argmax(-1)
            else:
                weights = restrict(logits, temperature, top_k, top_p)
                chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
            for n, token in enumerate(chosen.tolist()):
                running[n] = running[n] and token != end_id
                if running[n]:
                    results[n].append(token)
            if not any(running) or count + 1 == max_new_tokens:
                break
            hidden = model.step(chosen, cache)
    finally:
        model.train(was_training)
    return results
