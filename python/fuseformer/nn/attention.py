"""`torch.nn.MultiheadAttention` with the fused attention op inside."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention, attention_weights


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as a term to add to logits: -inf where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention with the constructor, weights and call of `torch.nn.MultiheadAttention`.

    Differences in what comes out: a query that sees no key gives zeros before the output projection
    where PyTorch gives NaN, and the weights returned in training are those before dropout.
    """

    def _projections(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return projected queries, keys and values, each (B, S, E)."""
        width = self.embed_dim
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            return (
                F.linear(query, self.q_proj_weight, biases[0]),
                F.linear(key, self.k_proj_weight, biases[1]),
                F.linear(value, self.v_proj_weight, biases[2]),
            )
        weight, bias = self.in_proj_weight, self.in_proj_bias
        assert weight is not None
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        q = F.linear(query, weight[:width], biases[0])
        if key is value:
            k, v = F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(
                2, dim=-1
            )
            return q, k, v
        k = F.linear(key, weight[width : 2 * width], biases[1])
        return q, k, F.linear(value, weight[2 * width :], biases[2])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, S, D)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"{name}: got {x.dim()} dimensions, expected 3, or 2 unbatched, as query"
                )
            if x.shape[-1] != width:
                raise ValueError(f"{name}: got width {x.shape[-1]}, expected {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: got shape {tuple(value.shape)}, expected length and batch of key, "
                f"{tuple(key.shape[:-1])}"
            )

    def _bias(
        self, attn_mask: Tensor | None, batch: int, sq: int, sk: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return `attn_mask`, (L, S) or (B * H, L, S), as an additive one of four dimensions."""
        if attn_mask is None:
            return None
        shared, per_head = (sq, sk), (batch * self.num_heads, sq, sk)
        if tuple(attn_mask.shape) not in (shared, per_head):
            raise ValueError(
                f"attn_mask: got shape {tuple(attn_mask.shape)}, expected {shared} or {per_head}"
            )
        bias = additive_mask(attn_mask, dtype)
        return bias[None, None] if bias.dim() == 2 else bias.view(batch, self.num_heads, sq, sk)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, with `need_weights`, the attention weights.

        Shapes and arguments are those of `torch.nn.MultiheadAttention.forward`: (L, N, E), or
        (N, L, E) with `batch_first`, or (L, E). `is_causal` is a hint that `attn_mask` is the
        causal mask and requires it. Raises `ValueError` that names the argument.
        """
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: got None, expected the mask that is_causal hints at")
        unbatched = query.dim() == 2
        aliases = key is query, value is key
        batch_dim = 0 if unbatched or self.batch_first else 1

        def batched(x: Tensor) -> Tensor:  # (B, S, E)
            return x[None] if unbatched else x.transpose(0, batch_dim)

        query = batched(query)
        key = query if aliases[0] else batched(key)
        value = key if aliases[1] else batched(value)
        if key.shape[0] != query.shape[0]:
            raise ValueError(f"key: got batch size {key.shape[0]}, expected {query.shape[0]}")
        if key_padding_mask is not None:
            if unbatched and key_padding_mask.dim() == 1:
                key_padding_mask = key_padding_mask[None]
            if tuple(key_padding_mask.shape) != tuple(key.shape[:2]):
                raise ValueError(
                    f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}, expected "
                    f"(batch, keys) = {tuple(key.shape[:2])}"
                )
        batch, sq, sk = query.shape[0], query.shape[1], key.shape[1]
        q, k, v = self._projections(query, key, value)
        appended = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], 1)
            appended += 1
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            appended += 1
        causal = is_causal and not appended
        bias = None if causal else self._bias(attn_mask, batch, sq, sk, q.dtype)
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            padding = additive_mask(key_padding_mask, q.dtype)[:, None, None]
            bias = padding if bias is None else bias + padding
            key_padding_mask = None
        if appended:
            bias = None if bias is None else F.pad(bias, (0, appended))
            if key_padding_mask is not None:
                key_padding_mask = F.pad(key_padding_mask, (0, appended))
        out, lse = attention(
            q,
            k,
            v,
            causal=causal,
            key_padding_mask=key_padding_mask,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            return_lse=True,
        )
        weights = None
        if need_weights:
            weights = attention_weights(
                q, k, lse, causal=causal, key_padding_mask=key_padding_mask, bias=bias
            ).to(q.dtype)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights[0] if unbatched else weights
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, E)
        return out[0] if unbatched else out.transpose(0, batch_dim), weights
