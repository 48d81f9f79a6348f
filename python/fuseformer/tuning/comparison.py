"""A training step of the tuned model against the same model from torch.nn, on the same records."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fuseformer.backends import explain
from fuseformer.models.causal_lm import CausalLM
from fuseformer.models.plain import PlainModel
from fuseformer.models.sequences import Sequences
from fuseformer.tuning.batches import Example, collate
from fuseformer.tuning.instructions import IGNORE_INDEX

#: How far the two losses may lie apart, relatively: both are float32 means of the same terms.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """Medians of a step's forward and backward in seconds, their paired ratio, what was run."""

    fused_seconds: float
    plain_seconds: float
    speedup: float
    tokens: int
    padded_tokens: int
    supervised: int
    decisions: str


def compare_with_torch(
    model: CausalLM, examples: Sequence[Example], repetitions: int = 5
) -> Comparison:
    """Time both models on one batch, packed for ours and padded for torch.nn's, in turn.

    Both have the same weights, and must give the same loss without dropout, whose masks differ:
    `RuntimeError` otherwise. They are timed with the model's dropout; the speedup is the median of
    the ratios of neighbouring runs.
    """
    batch = collate(examples)
    where = Sequences(batch.cu_seqlens, batch.max_seqlen)
    ids = pad_sequence([torch.tensor(e.input_ids) for e in examples], batch_first=True)
    targets = pad_sequence(
        [torch.tensor(e.targets) for e in examples],
        batch_first=True,
        padding_value=IGNORE_INDEX,
    )
    lengths = torch.tensor([e.tokens for e in examples])
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]

    def losses(dropout: float) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        fused = CausalLM(replace(model.config, dropout=dropout))
        fused.load_state_dict(model.state_dict())
        plain = PlainModel(fused)
        return (
            lambda: fused.loss(batch.input_ids, batch.positions, batch.targets, where),
            lambda: plain.loss(ids, targets, padding),
        )

    ours, theirs = (float(loss().detach()) for loss in losses(0.0))
    if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
        raise RuntimeError(f"the models disagree: fused loss {ours}, torch.nn loss {theirs}")

    def seconds(loss: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        loss().backward()
        return time.perf_counter() - start

    fused_loss, plain_loss = losses(model.config.dropout)
    with explain() as decisions:
        seconds(fused_loss)
    seconds(plain_loss)
    pairs = [(seconds(fused_loss), seconds(plain_loss)) for _ in range(repetitions)]
    return Comparison(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
        int(lengths.sum()),
        ids.numel(),
        batch.supervised,
        str(decisions),
    )
