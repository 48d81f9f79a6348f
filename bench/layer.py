"""Transformer layers and multi-head attention against those of torch.nn with the same weights.

Each call is a training step's forward and backward, with every parameter's gradient. Half padding
means sequences that end at half the length, told by a padding mask; only real positions count in
the loss. Results are compared without dropout, and timed without it and with the default of 0.1.

FLOP: 3 * forward; forward = 2 * tokens * weights of the matrices + 4 * B * S * S * width for each
attention, padding not left out.
"""

import copy

import torch
from torch import Tensor

import fuseformer as ff

from .timer import Candidate, Result, Row, compare, verify

FLOP_FORMULA = "6 * tokens * matrix weights + 12 * B * S * S * width per attention, padding too"
KINDS = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")


def run(quick: bool, device: str, dtype: torch.dtype) -> list[Row]:
    """Return the timings of every layer and case."""
    rows = []
    for kind in KINDS:
        for padded in (False, True):
            for dropout in (0.0, 0.1):
                rows += _case(kind, padded, dropout, quick, device, dtype)
    return rows


def _case(
    kind: str, padded: bool, dropout: float, quick: bool, device: str, dtype: torch.dtype
) -> list[Row]:
    torch.manual_seed(0)
    batch, length, width, heads = (2, 32, 32, 4) if quick else (4, 512, 512, 8)
    place = {"batch_first": True, "device": device, "dtype": dtype}
    theirs = getattr(torch.nn, kind)(width, heads, dropout=dropout, **place)
    ours = getattr(ff.nn, kind)(width, heads, dropout=dropout, **place)
    ours.load_state_dict(theirs.state_dict())
    x, memory, dout = (
        torch.randn(batch, length, width, device=device, dtype=dtype) for _ in range(3)
    )
    padding = None
    if padded:
        padding = torch.arange(length, device=device).expand(batch, length) >= length // 2
        dout = dout.masked_fill(padding[..., None], 0)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length, device, dtype)

    def call(module: torch.nn.Module, x: Tensor, memory: Tensor, dout: Tensor) -> Result:
        inputs = [x.detach().requires_grad_(), memory.detach().requires_grad_()]
        if kind == "MultiheadAttention":
            inputs = inputs[:1]
            out, _ = module(*inputs * 3, key_padding_mask=padding, need_weights=False)
        elif kind == "TransformerEncoderLayer":
            inputs = inputs[:1]
            out = module(*inputs, src_key_padding_mask=padding)
        else:
            masks = {"tgt_mask": causal.to(x.dtype), "tgt_is_causal": True}
            padded_at = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
            out = module(*inputs, **masks, **padded_at)
        gradients = torch.autograd.grad(out, [*inputs, *module.parameters()], dout)
        if padding is not None:  # what comes out at padding means nothing
            out = out.masked_fill(padding[..., None], 0)
        return (out.detach(), *gradients)

    candidates = [
        Candidate(name, lambda m=module: call(m, x, memory, dout))
        for name, module in (("torch.nn", theirs), ("fuseformer", ours))
    ]
    for module in (theirs, ours):
        _set_dropout(module, 0.0)
    exact = copy.deepcopy(theirs).double()
    wide = [t.double() for t in (x, memory, dout)]
    verify(candidates, lambda: call(exact, *wide), candidates[0].run())
    for module in (theirs, ours):
        _set_dropout(module, dropout)
    matrices = sum(p.numel() for p in theirs.parameters() if p.dim() == 2)
    attentions = 2 if kind == "TransformerDecoderLayer" else 1
    flops = 6 * batch * length * matrices + 12 * attentions * batch * length**2 * width
    label = f"{kind}, {'half padding' if padded else 'no padding'}, dropout {dropout}"
    return compare(
        f"{label} {batch}x{length}x{width}",
        candidates,
        flops=flops,
        repetitions=3 if quick else 9,
        device=device,
    )


def _set_dropout(layer: torch.nn.Module, p: float) -> None:
    for module in layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = p
