"""Continuing prompts, or answering sources: greedy, or drawn with temperature, top-k and top-p."""

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .cache import Cache
from .modes import evaluating


class GenerativeModel(Protocol):
    """What generation asks of an `nn.Module`; `CausalLM` and `EncoderDecoder` serve it."""

    def start(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, start_id: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Read `prompts`; return the hidden states (N, width) that the first new tokens come from.

        The cache that comes with them has room for `new_tokens` more in each sequence.
        """

    def step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Read one token a sequence, (N,); return the hidden states (N, width) behind them."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (N, vocab_size) of the next token for `hidden` (N, width)."""


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


class RepeatBlock:
    """What each of `count` continuations has said, to keep runs of `length` tokens from recurring.

    Source: Paulus et al., "A Deep Reinforced Model for Abstractive Summarization", 2018, section
    2.5, where `length` is 3.
    """

    def __init__(self, count: int, length: int) -> None:
        self._length = length
        self._said: list[list[int]] = [[] for _ in range(count)]
        self._next: list[dict[tuple[int, ...], set[int]]] = [{} for _ in range(count)]

    def _prefix(self, row: int) -> tuple[int, ...]:
        said = self._said[row]
        return tuple(said[len(said) - self._length + 1 :])

    def mask_(self, logits: Tensor) -> None:
        """Set to -inf, in `logits` (count, V), what would end a run that was there before."""
        for row, followers in enumerate(self._next):
            banned = followers.get(self._prefix(row))
            if banned:
                logits[row, list(banned)] = -math.inf

    def append(self, tokens: Sequence[int]) -> None:
        """Note the next token of each continuation."""
        for row, token in enumerate(tokens):
            if len(self._said[row]) >= self._length - 1:
                self._next[row].setdefault(self._prefix(row), set()).add(token)
            self._said[row].append(token)


def _check(
    temperature: float, top_k: int | None, top_p: float | None, no_repeat: int | None
) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or a number above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected a whole number from 1 up")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a number above 0, at most 1")
    if no_repeat is not None and no_repeat < 1:
        raise ValueError(f"no_repeat: got {no_repeat}, expected a whole number from 1 up")


def generate(
    model: GenerativeModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    start_id: int | None = None,
    end_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    no_repeat: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, without the prompt and without `end_id`.

    `model` is a `CausalLM`, or an `EncoderDecoder`, whose prompts are sources and whose targets
    begin with `start_id`. A `temperature` of 0 takes the likeliest token; no run of `no_repeat`
    tokens comes twice in a continuation. Each ends at `end_id` or after `max_new_tokens`. The model
    keeps its training mode, and draws no dropout meanwhile. Raises `ValueError` for an empty prompt
    of a `CausalLM`, a missing or needless `start_id`, a sequence too long for the model, or options
    out of range, and `TypeError` for a model that does not generate.
    """
    if not hasattr(model, "start"):
        raise TypeError(f"model: got {type(model).__name__}, expected CausalLM or EncoderDecoder")
    _check(temperature, top_k, top_p, no_repeat)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    results: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    block = None if no_repeat is None else RepeatBlock(len(prompts), no_repeat)
    with evaluating(cast(nn.Module, model)), torch.no_grad():
        hidden, cache = model.start(prompts, max_new_tokens, start_id)
        for count in range(max_new_tokens):
            logits = model.logits(hidden)  # (N, V)
            if block is not None:
                block.mask_(logits)
            if temperature == 0:
                chosen = logits.argmax(-1)
            else:
                weights = restrict(logits, temperature, top_k, top_p)
                chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
            if block is not None:
                block.append(chosen.tolist())
            for n, token in enumerate(chosen.tolist()):
                running[n] = running[n] and token != end_id
                if running[n]:
                    results[n].append(token)
            if not any(running) or count + 1 == max_new_tokens:
                break
            hidden = model.step(chosen, cache)
    return results
