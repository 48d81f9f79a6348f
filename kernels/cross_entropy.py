"""Vocabulary projection and cross entropy in Triton: a chunk of logits becomes its own gradient.

The products are the vendor's matmuls. Between them one kernel reads a chunk of logits, computes
lse and loss of each row, and overwrites the logits with their gradient while they are in cache.

Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2;
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .common import KernelSpec, launch, recorded_launches

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# Logits that exist at once. Each chunk past the first reads and writes the gradient of the weight
# once more, so that small chunks cost time: at 2048 rows of 65,536 classes the products hide it.
_LOGITS_BYTES = 1 << 28

# A row is read twice; 16 values to a thread keep both passes at 16-byte accesses without spills.
_MAX_BLOCK_V = 4096


def block_config(vocab: int) -> tuple[int, int]:
    """Return (BLOCK_V, warps) for rows of `vocab` logits."""
    block_v = min(_MAX_BLOCK_V, max(32, triton.next_power_of_2(vocab)))
    return block_v, max(1, min(8, block_v // 256))


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _capped(logits, softcap):
    """Return ``softcap * tanh(logits / softcap)``, or `logits` where `softcap` is None."""
    if softcap is not None:
        # tanh through an exponential that can only vanish.
        bounded = logits / softcap
        shrunk = tl.exp(-2.0 * tl.abs(bounded))
        size = softcap * ((1.0 - shrunk) / (1.0 + shrunk))
        logits = tl.where(bounded < 0, -size, size)
    return logits


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, lse_ptr, loss_ptr, upstream_ptr,
    ignore_index, label_smoothing, softcap, z_loss,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr,
    COMPUTE_LOSS: tl.constexpr, WRITE_GRADIENT: tl.constexpr, UPSTREAM_PER_ROW: tl.constexpr,
):  # fmt: skip
    """Compute lse and loss of one row, or read its lse, and turn its logits into their gradient.

    Grid: (rows,). `logits_ptr` is (rows, VOCAB) contiguous; `upstream_ptr` holds the gradient of
    the loss, one for all rows or one per row. An ignored row gets zeros. A class out of range makes
    the whole row NaN: the host cannot look at it without waiting for the device.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    columns = tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        if COMPUTE_LOSS:
            tl.store(lse_ptr + row, 0.0)
            tl.store(loss_ptr + row, 0.0)
        if WRITE_GRADIENT:
            nothing = tl.zeros((BLOCK_V,), tl.float32).to(logits_ptr.dtype.element_ty)
            for start in range(0, VOCAB, BLOCK_V):
                tl.store(logits_ptr + start + columns, nothing, mask=start + columns < VOCAB)
        return
    known = (target >= 0) & (target < VOCAB)

    if COMPUTE_LOSS:
        maximum = -float("inf")
        total = 0.0
        logit_sum = 0.0
        for start in range(0, VOCAB, BLOCK_V):
            inside = start + columns < VOCAB  # (BLOCK_V,)
            logits = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            logits = tl.where(inside, _capped(logits, softcap), -float("inf"))  # (BLOCK_V,)
            new_maximum = tl.maximum(maximum, tl.max(logits, 0))
            # Classes forbidden with -inf may fill whole blocks: any finite shift serves those.
            shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
            total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift), 0)
            maximum = new_maximum
            if label_smoothing is not None:
                logit_sum += tl.sum(tl.where(inside, logits, 0.0), 0)
        lse = maximum + tl.log(total)
        chosen = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        chosen = _capped(chosen, softcap)
        if label_smoothing is not None:
            chosen = (1.0 - label_smoothing) * chosen + label_smoothing * logit_sum / VOCAB
        tl.store(lse_ptr + row, lse)
        loss = lse - chosen
        if z_loss is not None:
            loss += z_loss * lse * lse
        tl.store(loss_ptr + row, loss)
        # Every thread has read the chosen logit before one of them overwrites it.
        tl.debug_barrier()
    else:
        lse = tl.load(lse_ptr + row)

    if WRITE_GRADIENT:
        upstream = tl.load(upstream_ptr + (row if UPSTREAM_PER_ROW else 0))
        upstream = tl.where(known, upstream, float("nan"))
        hit = 1.0
        if label_smoothing is not None:
            hit = 1.0 - label_smoothing
        lse_slope = 1.0
        if z_loss is not None:
            lse_slope += 2.0 * z_loss * lse
        for start in range(0, VOCAB, BLOCK_V):
            inside = start + columns < VOCAB  # (BLOCK_V,)
            logits = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            logits = _capped(logits, softcap)  # (BLOCK_V,)
            gradient = tl.exp(logits - lse)  # (BLOCK_V,)
            if z_loss is not None:
                gradient *= lse_slope
            gradient = tl.where(start + columns == target, gradient - hit, gradient)
            if label_smoothing is not None:
                gradient -= label_smoothing / VOCAB
            gradient *= upstream
            if softcap is not None:
                bounded = logits * (1.0 / softcap)  # a division each would take more registers
                gradient *= 1.0 - bounded * bounded
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + columns, gradient, mask=inside)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def _launch_rows(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    loss: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> None:
    """Fill `lse` and `loss` unless `loss` is None; with `upstream`, overwrite `logits`."""
    rows, vocab = logits.shape
    block_v, num_warps = block_config(vocab)
    arguments = {
        "logits_ptr": logits,
        "target_ptr": target,
        "lse_ptr": lse,
        "loss_ptr": loss,
        "upstream_ptr": upstream,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing or None,
        "softcap": softcap or None,
        "z_loss": z_loss or None,
        "VOCAB": vocab,
        "BLOCK_V": block_v,
        "COMPUTE_LOSS": loss is not None,
        "WRITE_GRADIENT": upstream is not None,
        "UPSTREAM_PER_ROW": upstream is not None and upstream.dim() == 1,
    }
    launch(cross_entropy_kernel, (rows,), arguments, num_warps=num_warps, num_stages=2)


def _capturing(target: Tensor) -> bool:
    """Return whether work on `target` is recorded into a CUDA graph, where nothing may be read."""
    return target.is_cuda and torch.cuda.is_current_stream_capturing()


class _Rows:
    """The rows that count, a chunk at a time; with a `bound`, that many rows and no wait for them.

    Their number decides shapes. Without a bound it is waited for, but for a CUDA graph's capture,
    which takes all rows. The kernel skips those that are taken and do not count. `count` is their
    number, NaN where more of them count than the bound says: that is wrong, and must be seen.
    """

    def __init__(self, target: Tensor, ignore_index: int, bound: int | None) -> None:
        self.target = target
        self.index: Tensor | None = None
        supervised = target != ignore_index
        total = target.shape[0]
        if bound is None and not _capturing(target):
            index = supervised.nonzero().flatten()
            self.count: Tensor | int = index.shape[0]
            self.size = index.shape[0]
            if self.size < total:
                self.index = index
            return
        self.size = total if bound is None else min(bound, total)
        count = supervised.sum()
        self.count = torch.where(count > self.size, float("nan"), count.float())
        if self.size < total:
            # Those that count come first, and in their order.
            self.index = (~supervised).byte().argsort(stable=True)[: self.size]

    def chunks(self, vocab: int, itemsize: int) -> Iterator[slice]:
        step = max(1, _LOGITS_BYTES // max(1, vocab * itemsize))
        for start in range(0, self.size, step):
            yield slice(start, min(start + step, self.size))

    def take(self, tensor: Tensor, chunk: slice) -> Tensor:
        return tensor[chunk] if self.index is None else tensor[self.index[chunk]]

    def put(self, tensor: Tensor, chunk: slice, values: Tensor) -> None:
        if self.index is None:
            tensor[chunk] = values
        else:
            tensor.index_copy_(0, self.index[chunk], values)


def _gradient_scale(dtype: torch.dtype, z_loss: float) -> float:
    """Return the power of 2 that gradients of logits are stored times, in `dtype`.

    float16 has neither the range nor the small numbers for a loss scale that is yet to come. A
    gradient is at most 1 in size, with a z-loss ``1 + 2 * z_loss * lse``, of logits in float16.
    """
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** math.floor(15 - math.log2(1 + 2 * z_loss * 65600))


def _product(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """Return ``a @ b`` in their dtype, or where `wide` in float32, unrounded."""
    if not wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # on the CPU, where tests run, PyTorch has no such product


class _Gradients:
    """Sums over chunks of the gradients of hidden, weight and bias.

    Those of logits come times `scale`. float16 lacks the range for a factor that is yet to come:
    there all products are float32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        self.weight, self.bias, self.scale = weight, bias, scale
        self.wide = hidden.dtype == torch.float16
        dtype = torch.float32 if self.wide else hidden.dtype
        self.dhidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None

    def add(self, rows: _Rows, chunk: slice, hidden: Tensor, gradient: Tensor) -> None:
        rows.put(self.dhidden, chunk, self._unscaled(_product(gradient, self.weight, self.wide)))
        dweight = self._unscaled(_product(gradient.t(), hidden, self.wide))
        # A single chunk needs no wider sum; further ones add up in float32.
        self.dweight = dweight if self.dweight is None else self.dweight.float().add_(dweight)
        if self.bias is not None:
            dbias = self._unscaled(gradient.sum(0, dtype=torch.float32))
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)

    def _unscaled(self, product: Tensor) -> Tensor:
        return product if self.scale == 1 else product.mul_(1 / self.scale)

    def results(self) -> tuple[Tensor, Tensor, Tensor | None]:
        dweight = torch.zeros_like(self.weight) if self.dweight is None else self.dweight
        dbias = self.dbias
        if self.bias is not None and dbias is None:
            dbias = torch.zeros_like(self.bias)
        return self.dhidden, dweight, dbias


def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    compute_grads: bool,
    max_supervised: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss, the lse (T,), and with `compute_grads` the gradients of the reduced loss.

    `hidden` is (T, width), `weight` (vocab, width), `bias` (vocab,) or None, `target` (T,) int64.
    Loss and lse are float32, 0 for ignored rows; a class out of range gives NaN. Gradients of
    weight and bias that were summed in float32 stay so, in float16 all are: the upstream factor is
    yet to come. Waits for the device unless told `max_supervised`; if more rows count, all is NaN.
    """
    rows = _Rows(target, ignore_index, max_supervised)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    losses = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    lses = torch.zeros_like(losses)
    scale = _gradient_scale(hidden.dtype, z_loss)
    gradients = _Gradients(hidden, weight, bias, scale) if compute_grads else None
    upstream = None
    if compute_grads:
        upstream = torch.full((), scale, dtype=torch.float32, device=target.device)
        if reduction == "mean":
            upstream = upstream / rows.count
        elif isinstance(rows.count, Tensor):
            upstream = torch.where(rows.count.isnan(), rows.count, upstream)
    for chunk in rows.chunks(weight.shape[0], hidden.element_size()):
        part = rows.take(hidden, chunk)
        logits = F.linear(part, weight, bias)
        lse = torch.empty(logits.shape[0], dtype=torch.float32, device=target.device)
        loss = torch.empty_like(lse)
        classes = rows.take(target, chunk).contiguous()
        _launch_rows(logits, classes, lse, loss, upstream, *options)
        rows.put(lses, chunk, lse)
        rows.put(losses, chunk, loss)
        if gradients is not None:
            gradients.add(rows, chunk, part, logits)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / rows.count
    elif isinstance(rows.count, Tensor):
        loss = torch.where(rows.count.isnan(), rows.count, loss)
    return (loss, lses, *((None, None, None) if gradients is None else gradients.results()))


def linear_cross_entropy_backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    max_supervised: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of hidden, weight and bias, with the logits computed a second time.

    `dloss` is a scalar, or (T,) for the reduction "none"; `lse` (T,) comes from forward. Waits for
    the device as forward does.
    """
    rows = _Rows(target, ignore_index, max_supervised)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    scale = _gradient_scale(hidden.dtype, z_loss)
    gradients = _Gradients(hidden, weight, bias, scale)
    dloss = dloss.float()
    if reduction == "mean":
        dloss = dloss / rows.count
    elif isinstance(rows.count, Tensor):
        dloss = torch.where(rows.count.isnan(), rows.count, dloss)
    size = None
    if hidden.dtype == torch.float16 and target.numel():
        # Gradients of logits times a loss scale would overflow: it is taken out, and put back last.
        counts = dloss if dloss.dim() == 0 else dloss.where(target != ignore_index, 0.0)
        size = counts.abs().amax()
        size = torch.where(size.isfinite() & (size > 0), size, 1.0)
        dloss = dloss / size * scale
    for chunk in rows.chunks(weight.shape[0], hidden.element_size()):
        part = rows.take(hidden, chunk)
        logits = F.linear(part, weight, bias)
        upstream = rows.take(dloss, chunk).contiguous() if dloss.dim() else dloss
        classes = rows.take(target, chunk).contiguous()
        lses = rows.take(lse, chunk)
        _launch_rows(logits, classes, lses, None, upstream, *options)
        gradients.add(rows, chunk, part, logits)
    results = gradients.results()
    if size is not None:
        results = tuple(g if g is None else g.mul_(size) for g in results)
    dhidden, dweight, dbias = results
    dbias = None if dbias is None else dbias.to(weight.dtype)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls; the configs are the same for every `family`."""

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 128
    values = meta(rows, dtype=torch.float32)
    scalar = meta(dtype=torch.float32)
    for dtype, vocab, smoothing, softcap, z_loss in (
        (torch.bfloat16, 32000, 0.0, 0.0, 0.0),
        (torch.bfloat16, 50257, 0.1, 30.0, 1e-4),
        (torch.float16, 1000, 0.1, 0.0, 0.0),
        (torch.float32, 32000, 0.1, 30.0, 1e-4),
        (torch.float32, 7, 0.0, 0.0, 1e-4),
    ):
        logits, target = meta(rows, vocab, dtype=dtype), meta(rows, dtype=torch.int64)
        options = (-100, smoothing, softcap, z_loss)
        with recorded_launches(family) as specs:
            _launch_rows(logits, target, values, values, None, *options)
            _launch_rows(logits, target, values, values, scalar, *options)
            _launch_rows(logits, target, values, None, values, *options)
        yield from specs
