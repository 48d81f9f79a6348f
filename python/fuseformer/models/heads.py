"""What reads a backbone's states: a classifier of sequences, and a finder of answer spans."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import widened
from .language_model import LanguageModel
from .modes import evaluating
from .sequences import Sequences, per_sequence_logsumexp, per_sequence_sum

POOLINGS = ("first", "last", "mean")


def _check_sequences(where: Sequences) -> None:
    if (where.lengths() < 1).any():
        raise ValueError("where: got an empty sequence, expected at least one token in each")


def _check_labels(name: str, labels: Tensor, limits: Tensor) -> None:
    """Require `labels` (N,) from 0 to below `limits` (N,)."""
    if labels.dtype != torch.int64 or labels.shape != limits.shape:
        raise ValueError(
            f"{name}: got {labels.dtype} of shape {tuple(labels.shape)}, expected int64 of shape "
            f"{tuple(limits.shape)}, one a sequence"
        )
    wrong = (labels < 0) | (labels >= limits)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: got {int(labels[index])} for sequence {index}, expected 0 to "
            f"{int(limits[index]) - 1}"
        )


class SequenceClassifier(nn.Module):
    """Scores of `classes` for each packed sequence, from a pooled state of `backbone`.

    `pooling` takes the state of the "first" or "last" token, or their "mean"; by default the mean,
    and for a causal backbone the last, which alone has seen everything. Arguments of the methods
    are those of the backbone; every sequence has a token. Raises `ValueError` that names the
    argument.

    Source: Devlin et al., "BERT", 2018, section 3.2, and Radford et al., "Improving Language
    Understanding by Generative Pre-Training", 2018, section 3.2, for a linear layer on a state.
    """

    def __init__(self, backbone: LanguageModel, classes: int, pooling: str | None = None) -> None:
        super().__init__()
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise ValueError(f"classes: got {classes!r}, expected a whole number from 1 up")
        if pooling is None:
            pooling = "last" if backbone.causal else "mean"
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}, expected one of {', '.join(POOLINGS)}")
        self.backbone, self.classes, self.pooling = backbone, classes, pooling
        self.dropout = nn.Dropout(backbone.config.dropout)
        self.classifier = nn.Linear(backbone.config.width, classes)

    def pool(self, hidden: Tensor, where: Sequences) -> Tensor:
        """Return the pooled state (N, width) of each sequence of `hidden` (T, width)."""
        if self.pooling == "mean":
            total = per_sequence_sum(widened(hidden), where)
            return (total / where.lengths()[:, None]).to(hidden.dtype)
        if self.pooling == "first":
            return hidden[where.cu_seqlens[:-1].long()]
        return hidden[where.cu_seqlens[1:].long() - 1]

    def forward(self, input_ids: Tensor, positions: Tensor, where: Sequences) -> Tensor:
        """Return the scores (N, classes) of each sequence."""
        _check_sequences(where)
        pooled = self.pool(self.backbone(input_ids, positions, where), where)
        return self.classifier(self.dropout(pooled))

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        where: Sequences,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the cross entropy of the classes `labels` (N,) int64.

        A scalar for the reductions "mean" and "sum", (N,) for "none".
        """
        limits = torch.full_like(where.cu_seqlens[1:], self.classes)
        _check_labels("labels", labels, limits)
        scores = self(input_ids, positions, where)
        return F.cross_entropy(widened(scores), labels, reduction=reduction)

    @torch.no_grad()
    def predict(self, input_ids: Tensor, positions: Tensor, where: Sequences) -> Tensor:
        """Return the likeliest class (N,) of each sequence, without dropout."""
        with evaluating(self):
            return self(input_ids, positions, where).argmax(-1)


class Spans(NamedTuple):
    """A span a sequence: its first and last token, counted within the sequence, and its score.

    All are (N,); where a sequence allows no span, both tokens are -1 and the score is -inf.
    """

    starts: Tensor
    ends: Tensor
    scores: Tensor


def best_spans(
    start_scores: Tensor,
    end_scores: Tensor,
    where: Sequences,
    max_length: int = 30,
    allowed: Tensor | None = None,
) -> Spans:
    """Return the span of each sequence with the greatest sum of start and end score.

    The scores are (T,). A span has from 1 to `max_length` tokens and lies within its sequence; it
    begins and ends at tokens where `allowed` (T,) bool is True, if it is given. Raises `ValueError`
    that names the argument.
    """
    if max_length < 1:
        raise ValueError(f"max_length: got {max_length}, expected a whole number from 1 up")
    if allowed is not None:
        if allowed.dtype != torch.bool or allowed.shape != start_scores.shape:
            raise ValueError(
                f"allowed: got {allowed.dtype} of shape {tuple(allowed.shape)}, expected bool of "
                f"shape {tuple(start_scores.shape)}"
            )
        start_scores, end_scores = (
            scores.masked_fill(~allowed, -torch.inf) for scores in (start_scores, end_scores)
        )
    total = len(start_scores)
    owners = where.owners(total)
    best = end_scores.clone()  # of the ends that a start may have, the best score and its distance
    distance = torch.zeros_like(owners)
    for gap in range(1, min(max_length, where.max_seqlen)):
        later, head = end_scores[gap:], best[: total - gap]
        better = (later > head) & (owners[gap:] == owners[: total - gap])
        head[better] = later[better]
        distance[: total - gap][better] = gap
    sums = start_scores + best
    lengths = where.lengths().tolist()
    starts, ends = owners.new_full((2, len(lengths)), -1)
    scores = sums.new_full((len(lengths),), -torch.inf)
    for n, part in enumerate(sums.split(lengths)):
        if len(part) and part.max() > -torch.inf:
            starts[n] = part.argmax()
            scores[n] = part.max()
            ends[n] = starts[n] + distance[where.cu_seqlens[n] + starts[n]]
    return Spans(starts, ends, scores)


class SpanAnswerer(nn.Module):
    """Start and end scores of an answer for each token of packed sequences.

    Arguments of the methods are those of `backbone`. Raises `ValueError` that names the argument.

    Source: Devlin et al., "BERT", 2018, section 4.2.
    """

    def __init__(self, backbone: LanguageModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(backbone.config.dropout)
        self.scorer = nn.Linear(backbone.config.width, 2)

    def forward(
        self, input_ids: Tensor, positions: Tensor, where: Sequences
    ) -> tuple[Tensor, Tensor]:
        """Return the start and the end score of each token, each (T,)."""
        hidden = self.dropout(self.backbone(input_ids, positions, where))
        starts, ends = self.scorer(hidden).unbind(-1)
        return starts, ends

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        starts: Tensor,
        ends: Tensor,
        where: Sequences,
        reduction: str = "mean",
    ) -> Tensor:
        """Return half the cross entropy of the answers' first and last tokens, added.

        `starts` and `ends` (N,) int64 are counted within each sequence, whose tokens are the
        classes. A scalar for the reductions "mean" and "sum", (N,) for "none".
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, expected mean, sum or none")
        _check_sequences(where)
        for name, labels in (("starts", starts), ("ends", ends)):
            _check_labels(name, labels, where.lengths())
        if (starts > ends).any():
            raise ValueError("ends: got one before its start, expected it there or after")
        first = where.cu_seqlens[:-1].long()
        losses = first.new_zeros((), dtype=torch.float32)
        for scores, labels in zip(self(input_ids, positions, where), (starts, ends), strict=True):
            wide = widened(scores)
            chosen = wide[first + labels]
            losses = losses + (per_sequence_logsumexp(wide, where) - chosen) / 2
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.mean()

    @torch.no_grad()
    def answer(
        self,
        input_ids: Tensor,
        positions: Tensor,
        where: Sequences,
        max_length: int = 30,
        allowed: Tensor | None = None,
    ) -> Spans:
        """Return the best span of each sequence, without dropout; see `best_spans`."""
        with evaluating(self):
            starts, ends = self(input_ids, positions, where)
        return best_spans(starts, ends, where, max_length, allowed)
