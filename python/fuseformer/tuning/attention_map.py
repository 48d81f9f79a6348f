"""Where a head looked: attention probabilities of a trained model, from the fused kernel's lse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fuseformer.models.causal_lm import CausalLM
from fuseformer.models.modes import evaluating
from fuseformer.models.sequences import pack_ids
from fuseformer.ops.attention import attention
from fuseformer.ops.attention_weights import attention_weights
from fuseformer.tuning.tokenizer import Tokenizer


@dataclass(frozen=True)
class AttentionMap:
    """Probabilities (S, S) of one head, query rows by key columns, and the text of each token."""

    layer: int
    head: int
    weights: Tensor
    tokens: list[str]


@torch.no_grad()
def attention_maps(model: CausalLM, ids: list[int], layer: int) -> Tensor:
    """Return the probabilities (heads, S, S) with which block `layer` attends in `ids` (S tokens).

    Raises `ValueError` for a layer that the model lacks, or a sequence too long for it.
    """
    blocks = model.blocks.blocks()
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer: got {layer}, expected 0 to {len(blocks) - 1}")
    with evaluating(model):
        input_ids, positions, where = pack_ids([ids], model.device)
        x = model.embed(input_ids, positions, where, "input")
        for block in blocks[:layer]:
            x = block(x, where, True)
        projected = blocks[layer].attention.project(x)  # each (S, heads, head_dim)
        q, k, v = (t.transpose(0, 1)[None] for t in projected)  # (1, heads, S, head_dim)
        _, lse = attention(q, k, v, causal=True, return_lse=True)
        return attention_weights(q, k, lse, causal=True)[0]


def sharpest_map(model: CausalLM, tokenizer: Tokenizer, ids: list[int]) -> AttentionMap:
    """Return the map of the head in the last block whose last row is the least spread out.

    A head that looks everywhere says little; the last row is the one that the answer comes from.
    The first token, on which idle heads rest, does not count.
    """
    layer = len(model.blocks) - 1
    maps = attention_maps(model, ids, layer)  # (heads, S, S)
    head = int(maps[:, -1, 1:].amax(-1).argmax())
    tokens = [tokenizer.decode([i]) if i > 4 else "·" for i in ids]
    return AttentionMap(layer, head, maps[head], tokens)
