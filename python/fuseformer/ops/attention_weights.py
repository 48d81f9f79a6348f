"""The probabilities of attention, for looking at: what the fused op never writes."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import checks
from .attention import check_heads, check_masks, default_scale


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    heads: list[int] | None = None,
    rows: list[int] | None = None,
    causal: bool | str = False,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention probabilities of chosen heads and rows, from the lse of `attention`.

    `q` (B, H, Sq, D), `k` (B, Hkv, Sk, D) and `lse` (B, H, Sq) are those of the call, and so are
    the options. `heads` and `rows` are indices, all of them by default; only their logits are
    computed. Returns (B, len(heads), len(rows), Sk), float32, before dropout; a row that saw no
    key is 0. Raises `ValueError` where shapes do not fit.
    """
    checks.tensor("q", q, 4)
    checks.tensor("k", k, 4, like=q)
    check_heads(q, k, k, 1)
    check_masks(q, k, key_padding_mask, key_lengths, bias)
    checks.shape("lse", lse, tuple(q.shape[:3]), "(batch, heads, queries)")
    batch, all_heads, sq, _ = q.shape
    sk = k.shape[2]
    integers: dict[str, Any] = {"dtype": torch.int64, "device": q.device}
    head = torch.tensor(range(all_heads) if heads is None else heads, **integers)
    row = torch.tensor(range(sq) if rows is None else rows, **integers)
    k = k[:, head // (all_heads // k.shape[1])]
    if bias is not None:
        bias = bias.expand(batch, all_heads, sq, sk)[:, head][:, :, row]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes[head]
    # Not rounded: the kernels that made the lse did not, either.
    logits = reference.capped_logits(
        reference.widened(q[:, head][:, :, row]),
        reference.widened(k),
        default_scale(q) if scale is None else checks.scale(scale),
        checks.softcap(softcap),
    )
    alignment = checks.causal(causal)
    logits = reference.add_bias_and_masks(
        logits,
        rows=row,
        columns=range(sk),
        offset=reference.diagonal_offset(alignment, sq, sk, key_lengths),
        causal=alignment != "none",
        key_padding_mask=key_padding_mask,
        key_lengths=key_lengths,
        bias=bias,
        window=checks.window(window),
        alibi_slopes=alibi_slopes,
    )
    lse = lse[:, head][:, :, row]
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
