"""Multi-head attention: `torch.nn.MultiheadAttention` with the fused op inside."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention
from ..ops.dropout import keep_mask
from ..ops.registration import autocast_float_dtype
from ..philox import draw_seed, dropout_scale
from ..reference import widened
from .nested import nested_like, padded
from .parts import leaf


def is_standard_causal(mask: Tensor) -> bool:
    """Return whether `mask`, bool or additive, is the square causal mask.

    Looking at the mask waits for the device, so it is not done while compiling or capturing a
    graph, where the mask is then served as it is. Callers who know say so by `is_causal` instead,
    and nothing waits. A mask that learns is never the causal mask.
    """
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.requires_grad:
        return False
    if torch.compiler.is_compiling():
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return bool((mask == future).all())
    return bool((mask == torch.zeros_like(mask).masked_fill(future, -math.inf)).all())


def adopt(module: torch.nn.MultiheadAttention) -> "MultiheadAttention":
    """Turn `module` into a `MultiheadAttention` of this package, in place, and return it.

    Both classes have the same attributes, so parameters, hooks and random state stay untouched.
    """
    module.__class__ = MultiheadAttention
    assert isinstance(module, MultiheadAttention)
    return module


def _check_mask(name: str, mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a torch.Tensor")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected bool or floating point")


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.to(like.dtype)


def _attend_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return attention's output (B, H, L, D) and its weights (B, H, L, S) after dropout.

    Who asks for the weights has them in memory whatever computes the output, so it is computed from
    them: that is less work than the fused op beside a second softmax.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, L, S)
    hidden = None
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None]
        hidden = padding if hidden is None else hidden | padding
    blind = None  # rows without a visible key: softmax gets something finite, the result is 0
    if hidden is not None or bias is not None:
        blocked = torch.zeros((), dtype=torch.bool, device=q.device) if hidden is None else hidden
        if bias is not None:
            blocked = blocked | (bias.detach() == -math.inf)
        blind = blocked.all(-1, keepdim=True)
        if q.device.type == "cpu" and not torch.compiler.is_compiling() and not blind.any():
            blind = None
    if bias is not None:
        logits = logits + (bias if blind is None else bias.masked_fill(blind, 0.0))
    if hidden is not None:
        logits = logits.masked_fill(hidden if blind is None else hidden & ~blind, -math.inf)
    weights = torch.softmax(logits, -1, dtype=widened(q[:0]).dtype)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    weights = weights.to(autocast_float_dtype(q, q.dtype))
    if dropout_p > 0:
        keep = keep_mask(draw_seed(q.device), dropout_p, *weights.shape)
        weights = weights * keep * dropout_scale(dropout_p)
    return weights.to(v.dtype) @ v, weights


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention with the arguments, call and `state_dict` of `torch.nn`.

    Boolean padding masks and causal masks are applied inside the kernel; other masks are its
    additive bias. A query that sees no key gives the output projection's bias, never NaN.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.
    """

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
        """Return the attended values and, with `need_weights`, the attention weights.

        Shapes: `query` (L, B, E), `key` (S, B, kdim), `value` (S, B, vdim), with `batch_first` the
        batch leads, unbatched it is missing. `key_padding_mask` (B, S) and `attn_mask` (L, S) or
        (B * heads, L, S) are bool, True where attention is not allowed, or floats to be added.
        `is_causal` promises that `attn_mask` is the causal one, which then need not be given.
        Returns the output, shaped like `query`, and the weights after dropout, (B, L, S) or, not
        averaged, (B, heads, L, S), or None. Raises `ValueError` or `TypeError` that names the
        argument.
        """
        if type(query) is torch.fx.Proxy:
            return leaf(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if query.is_nested:
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        self._check(query, key, value)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)  # each (B, H, L or S, D)
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        # As PyTorch, which then does not look at a mask that would not fit.
        if is_causal and attn_mask is not None and key_padding_mask is None and not need_weights:
            fits = isinstance(attn_mask, Tensor) and attn_mask.shape[-2:] == (queries, keys)
            attn_mask = attn_mask if fits else None
        self._check_masks(q, keys, key_padding_mask, attn_mask, batched)
        # The hint replaces the mask. A mask that is not square is kept: it may align differently.
        causal = is_causal and (attn_mask is None or queries == keys)
        padding, bias = None, None
        if attn_mask is not None and not causal:
            bias = _additive(attn_mask, q)
            if bias.dim() == 3:
                bias = bias.unflatten(0, (batch, heads))  # (B, H, L, S)
        if key_padding_mask is not None:
            rows = key_padding_mask if batched else key_padding_mask[None]  # (B, S)
            if rows.dtype == torch.bool:
                padding = rows
            else:
                added = _additive(rows, q)[:, None, None]  # (B, 1, 1, S)
                bias = added if bias is None else bias + added
        if self.bias_k is not None or self.add_zero_attn:
            if causal:
                future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1)
                blocked = _additive(future, q)
                bias, causal = blocked if bias is None else bias + blocked, False
            k, v = self._extra_keys(k, v)
            extra = k.shape[2] - keys
            padding = None if padding is None else F.pad(padding, (0, extra))
            bias = None if bias is None else F.pad(bias, (0, extra))
        options: dict[str, Any] = {"causal": causal, "key_padding_mask": padding, "bias": bias}
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _attend_with_weights(q, k, v, dropout_p=dropout_p, **options)
        else:
            out = attention(q, k, v, dropout_p=dropout_p, **options)
        if batched and not self.batch_first:
            out = out.permute(2, 0, 1, 3).flatten(2)  # (L, B, E)
        else:
            out = out.transpose(1, 2).flatten(2)  # (B, L, E)
        # As in PyTorch, which reads the projection's parameters and does not call it.
        out = F.linear(out if batched else out[0], self.out_proj.weight, self.out_proj.bias)
        if weights is None:
            return out, None
        if average_attn_weights:
            weights = weights.mean(1)  # (B, L, S)
        return out, weights if batched else weights[0]

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within nested sequences; the weights come padded, as from `torch.nn`."""
        if not self.batch_first or not (key.is_nested and value.is_nested):
            raise ValueError(
                "query: got a nested tensor, expected nested key and value and batch_first=True"
            )
        same = query is key and key is value
        if query.numel() == 0:
            return query, None
        dense, padding = padded(query)
        keys, values = dense, dense
        if not same:
            (keys, padding), (values, _) = padded(key), padded(value)
        out, weights = self.forward(
            dense,
            keys,
            values,
            key_padding_mask=padding,
            need_weights=need_weights,
            average_attn_weights=average,
        )
        return nested_like(out, query), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(
            ("query", "key", "value"), (query, key, value), widths, strict=True
        ):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
            if x.is_nested:
                raise TypeError(f"{name}: got a nested tensor, expected a padded one like query")
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"{name}: got {x.dim()} dimensions, expected 3, or 2 for all when unbatched"
                )
            if x.shape[-1] != width:
                raise ValueError(f"{name}: got width {x.shape[-1]}, expected {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: got shape {tuple(value.shape)}, expected the length and batch of key, "
                f"{tuple(key.shape)}"
            )
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ValueError(
                f"key: got batch size {key.shape[batch_dim]}, expected {query.shape[batch_dim]}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the projected heads; inputs that are one tensor share one product."""
        bias, width = self.in_proj_bias, self.embed_dim
        if self._qkv_same_embed_dim and query is key and key is value:
            return self._split(F.linear(query, self.in_proj_weight, bias), 3)
        if self._qkv_same_embed_dim and key is value:
            q_weight, kv_weight = self.in_proj_weight.split((width, 2 * width))
            q_bias, kv_bias = (None, None) if bias is None else bias.split((width, 2 * width))
            (q,) = self._split(F.linear(query, q_weight, q_bias), 1)
            return (q, *self._split(F.linear(key, kv_weight, kv_bias), 2))
        if self._qkv_same_embed_dim:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return tuple(self._split(F.linear(x, w, b), 1)[0] for x, w, b in inputs)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        x = x.unflatten(-1, (parts, self.num_heads, self.head_dim))  # (B, L, parts, H, D)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def _check_masks(
        self,
        q: Tensor,
        keys: int,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batched: bool,
    ) -> None:
        batch, heads, queries, _ = q.shape
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask)
            expected = (batch, keys) if batched else (keys,)
            if tuple(key_padding_mask.shape) != expected:
                raise ValueError(
                    f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}, expected "
                    f"{expected}"
                )
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask)
            if tuple(attn_mask.shape) not in ((queries, keys), (batch * heads, queries, keys)):
                raise ValueError(
                    f"attn_mask: got shape {tuple(attn_mask.shape)}, expected {(queries, keys)} or "
                    f"{(batch * heads, queries, keys)}"
                )

    def _extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values with the learned and the zero position that were asked for."""
        batch, heads, _, dim = k.shape
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, heads, 1, dim)
            extra_k, extra_v = (
                b.view(shape).expand(batch, -1, -1, -1).to(k.dtype)
                for b in (self.bias_k, self.bias_v)
            )
            k, v = torch.cat((k, extra_k), 2), torch.cat((v, extra_v), 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v
