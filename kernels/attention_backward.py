"""Flash attention in Triton: what the backward pass launches, and its preprocessing kernel."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_bias_gradient import bias_gradient
from .attention_gradients import attention_key_gradient_kernel, attention_query_gradient_kernel
from .attention_layout import (
    Layout,
    Options,
    laid_out_like,
    near,
    positive_scale,
    unit_stride,
)
from .attention_logits import LOG2E
from .attention_tiles import (
    RUNTIME_SIZES,
    aligned,
    head_base,
    load_tile,
    sequence_bounds,
    tile_offsets,
)
from .common import launch

# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

# Elements of a tile of the delta kernel: 16 of each tensor to a thread.
_DELTA_TILE = 2048

# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_delta_kernel(
    out_ptr, stride_ob, stride_oh, stride_os,
    dout_ptr, stride_dob, stride_doh, stride_dos,
    lse_ptr, dlse_ptr, lse_log2_ptr, delta_ptr, stride_lb, stride_lh,
    cu_seqlens_q, cu_seqlens_k, heads, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute delta, and the lse in units of exp2, of one query block of one head.

    Grid as in the forward pass. A row without keys gets an lse of +inf and delta 0: whatever comes
    in from dout or dlse, its probabilities are 0 and its gradients exactly 0.
    """
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = pid // (blocks * heads)
    head = pid // blocks % heads
    row = (pid % blocks) * BLOCK_M
    start_q, _, seqlen_q, _, _, _ = sequence_bounds(
        batch, cu_seqlens_q, cu_seqlens_k, None, seqlen_q, seqlen_k, False
    )
    if row >= seqlen_q:
        return
    stride_os, stride_dos = aligned(stride_os, ALIGN), aligned(stride_dos, ALIGN)
    out_base = head_base(out_ptr, batch, head, start_q, stride_ob, stride_oh, stride_os, ALIGN)
    dout_base = head_base(dout_ptr, batch, head, start_q, stride_dob, stride_doh, stride_dos, ALIGN)
    out_offsets = tile_offsets(stride_os, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    dout_offsets = tile_offsets(stride_dos, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    out = load_tile(out_base, out_offsets, row, stride_os, seqlen_q, HEAD_DIM, True)
    dout = load_tile(dout_base, dout_offsets, row, stride_dos, seqlen_q, HEAD_DIM, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # (BLOCK_M,)
    rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    places = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + start_q + rows
    lse = tl.load(lse_ptr + places, mask=rows < seqlen_q, other=0.0)  # (BLOCK_M,)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + places, mask=rows < seqlen_q, other=0.0)
    empty = lse == -float("inf")  # (BLOCK_M,)
    lse_log2 = tl.where(empty, float("inf"), lse * LOG2E)  # (BLOCK_M,)
    tl.store(lse_log2_ptr + places, lse_log2, mask=rows < seqlen_q)
    tl.store(delta_ptr + places, tl.where(empty, 0.0, delta), mask=rows < seqlen_q)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def _launch_delta(
    layout: Layout, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return delta and the lse in units of exp2, both like `lse`."""
    lse_log2, delta = torch.empty_like(lse), torch.empty_like(lse)
    block_m = _DELTA_TILE // layout.block_d
    packed = layout.cu_seqlens_q is not None
    arguments = {
        "out_ptr": out,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "lse_log2_ptr": lse_log2,
        "delta_ptr": delta,
        "stride_lb": 0 if packed else lse.stride(0),
        "stride_lh": lse.stride(-2),
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "heads": layout.heads,
        "seqlen_q": layout.seqlen_q,
        "seqlen_k": layout.seqlen_k,
        "HEAD_DIM": layout.head_dim,
        "BLOCK_D": layout.block_d,
        "BLOCK_M": block_m,
        **layout.strides(o=out, do=dout),
    }
    blocks = triton.cdiv(layout.seqlen_q, block_m)
    grid = (blocks * layout.heads * layout.batch,)
    launch(attention_delta_kernel, grid, arguments, num_warps=4, num_stages=1)
    return lse_log2, delta


def _sink_gradient(
    sinks: Tensor, lse: Tensor, dlse: Tensor | None, delta: Tensor, total: Tensor
) -> Tensor:
    """Return the gradient of `sinks` (H,): a sink is a key whose value is 0.

    `lse`, `dlse`, `delta` and `total`, the sums of dS over the keys, are (B, H, Sq) or (H, Tq).
    Delta is as wrong as the output was rounded, and one query has no others to cancel that. What it
    stands for, rowsum(P * dP), is ``total + delta * rowsum(P)`` whatever delta was used. Rows that
    no sequence owns have an lse of -inf, and a delta and a total that nobody wrote.
    """
    weights = torch.exp(sinks.float()[:, None] - lse)  # of the sinks, by row
    exact = total + delta * (1 - weights)
    if dlse is not None:
        exact -= dlse
    rows = torch.where(lse.isfinite(), weights * exact, 0.0).sum(-1)
    return (-rows.sum(0) if rows.dim() == 2 else -rows).to(sinks.dtype)


def _launch_backward(
    layout: Layout,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, and where asked for dbias and dsinks."""
    packed = layout.cu_seqlens_q is not None
    given = (q, k, v)
    q, k, v, out, dout = (near(x, 0 if packed else 2) for x in (q, k, v, out, dout))
    like = torch.zeros_like if packed else torch.empty_like
    dq, dk, dv = like(q), like(k), like(v)
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    signed_q, scale = positive_scale(q, options.scale)
    options = replace(options, scale=scale)
    lse_log2, delta = _launch_delta(layout, out, dout, lse, dlse)
    inputs = {
        "q_ptr": signed_q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "lse_log2_ptr": lse_log2,
        "delta_ptr": delta,
        **layout.arguments(lse, options),
    }
    key_arguments = {
        **inputs,
        "dk_ptr": dk,
        "dv_ptr": dv,
        **layout.strides(q=signed_q, k=k, v=v, do=dout, dk=dk, dv=dv),
    }
    layout.launch_pass(
        "key_gradient", attention_key_gradient_kernel, options, key_arguments, keys=True
    )
    total = None if options.sinks is None else torch.empty_like(lse)
    query_arguments = {
        **inputs,
        "dq_ptr": dq,
        "total_ptr": total,
        **layout.strides(q=signed_q, k=k, v=v, do=dout, dq=dq),
    }
    layout.launch_pass("query_gradient", attention_query_gradient_kernel, options, query_arguments)
    dbias = None
    if bias_grad and options.bias is not None:
        inputs |= layout.strides(q=signed_q, k=k, v=v, do=dout)
        dbias = bias_gradient(layout, options, options.bias, inputs)
    dsinks = None
    if options.sinks is not None and total is not None:
        dsinks = _sink_gradient(options.sinks, lse, dlse, delta, total)
    if signed_q is not q:
        dq.neg_()
    dq, dk, dv = map(laid_out_like, (dq, dk, dv), given, (q, k, v))
    return dq, dk, dv, dbias, dsinks


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv like `q`, `k`, `v`, dbias like `bias` if `bias_grad`, and dsinks.

    `out` and `lse` are what `attention_forward` returned, `dout` and `dlse` their gradients; `dlse`
    may be None. Rows that see no key and keys that are padding get gradients of exactly 0.
    """
    layout = Layout.dense(q, k)
    masks = (bias, key_padding_mask, key_lengths, alibi_slopes, sinks)
    options = Options(seed, causal, window_left, window_right, softcap, scale, dropout_p, *masks)
    return _launch_backward(layout, dout, dlse, q, k, v, out, lse, options, bias_grad)


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk and dv of packed sequences like `q`, `k` and `v`, dbias and dsinks.

    As `attention_backward`; rows that no sequence owns get 0.
    """
    layout = Layout.packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = Options(
        seed, causal, window_left, window_right, softcap, scale, dropout_p,
        bias, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    return _launch_backward(layout, dout, dlse, q, k, v, out, lse, options, bias_grad)
