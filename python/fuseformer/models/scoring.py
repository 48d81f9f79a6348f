"""How probable a causal language model finds given tokens."""

from collections.abc import Sequence

import torch

from .causal_lm import CausalLM
from .modes import evaluating
from .sequences import pack_ids, per_sequence_sum

IGNORED = -100


@torch.no_grad()
def sequence_nll(
    model: CausalLM, sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[tuple[float, int]]:
    """Return, for each sequence, the summed negative log-likelihood of its labels and their number.

    `labels[i][j]` is the token to be expected at `sequences[i][j]` given those before it, or -100
    where it does not count; the first of a sequence never counts. The unit is nats. All sequences
    are packed into one pass without dropout, and logits exist a chunk at a time. Raises
    `ValueError` where labels and sequences differ in number or length, for foreign tokens, and for
    a sequence longer than the model reads, its last token not counted.
    """
    if len(labels) != len(sequences):
        raise ValueError(f"labels: got {len(labels)}, expected {len(sequences)} as in sequences")
    for index, (tokens, expected) in enumerate(zip(sequences, labels, strict=True)):
        if len(tokens) != len(expected):
            raise ValueError(
                f"labels: got {len(expected)} for sequence {index}, expected one for each of its "
                f"{len(tokens)} tokens"
            )
    # Behind token j the model predicts token j + 1, so that is where the label of j + 1 belongs;
    # behind the last it predicts nothing, so that is not read.
    shifted = [expected[1:] for expected in labels]
    counts = [sum(label != IGNORED for label in expected) for expected in shifted]
    if not any(counts):
        return [(0.0, 0) for _ in sequences]
    ids, positions, where = pack_ids([tokens[:-1] for tokens in sequences], model.device)
    targets, _, _ = pack_ids(shifted, model.device)
    with evaluating(model):
        losses = model.loss(ids, positions, targets, where, reduction="none")
    sums = per_sequence_sum(losses.double(), where).tolist()
    return list(zip(sums, counts, strict=True))
