"""Vocabulary projection and cross entropy on the CPU, for supervised rows and a chunk at a time."""

import torch
from torch import Tensor

from ..reference import widened

# Logits of a chunk: 16 MiB of float32. Larger chunks gain no speed in the matmuls.
_LOGITS_PER_CHUNK = 1 << 22

# Classes whose float16 weights are widened at once, a few MiB at the widths of language models.
_CLASSES_PER_BLOCK = 1 << 10


def _supervised(target: Tensor, ignore_index: int, classes: int, bound: int | None) -> Tensor:
    """Return the indices (N,) of the rows that count.

    Raises `ValueError` for a foreign class, and for more rows than the `bound` promises.
    """
    rows = (target != ignore_index).nonzero().flatten()
    if bound is not None and len(rows) > bound:
        raise ValueError(f"max_supervised: got {bound}, expected at least {len(rows)}")
    chosen = target[rows]
    if len(rows) and (int(chosen.min()) < 0 or int(chosen.max()) >= classes):
        raise ValueError(
            f"target: got classes from {int(chosen.min())} to {int(chosen.max())}, expected 0 to "
            f"{classes - 1} or ignore_index {ignore_index}"
        )
    return rows


def _chunks(rows: Tensor, classes: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, _LOGITS_PER_CHUNK // max(1, classes)))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Return the logits (N, V) and, with a softcap, the derivative of the cap."""
    logits = widened(torch.nn.functional.linear(hidden, weight, bias))
    if not softcap:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return softcap * bounded, 1 - bounded**2


def _losses(
    logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp of each row, both (N,)."""
    lse = torch.logsumexp(logits, -1)
    chosen = logits.gather(1, target[:, None]).squeeze(1)
    if label_smoothing:
        chosen = (1 - label_smoothing) * chosen + label_smoothing * logits.mean(-1)
    loss = lse - chosen
    return (loss + z_loss * lse.square() if z_loss else loss), lse


def _logit_gradients(
    logits: Tensor,
    slope: Tensor | None,
    target: Tensor,
    lse: Tensor,
    factors: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Turn `logits` in place into the gradient of ``sum(factors * loss)``; `factors` is (N, 1)."""
    # Not exp(logits - lse): the rounding of lse would be an error of the whole row, and add up.
    gradient = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    gradient.div_(gradient.sum(-1, keepdim=True))
    if z_loss:
        gradient.mul_((1 + 2 * z_loss * lse)[:, None])
    if label_smoothing:
        gradient.sub_(label_smoothing / logits.shape[1])
    gradient.scatter_add_(1, target[:, None], lse.new_full((len(target), 1), label_smoothing - 1))
    gradient.mul_(factors)
    return gradient if slope is None else gradient.mul_(slope)


class _Gradients:
    """Sums of the gradients of hidden, weight and bias over chunks.

    float16 has neither the range nor the small numbers for a loss scale that is yet to come: its
    products are float32, a block of classes at a time, as is the gradient of hidden.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight = hidden, weight
        sums = widened(weight[:0]).dtype
        self.wide = hidden.dtype == torch.float16
        self.dhidden = torch.zeros(hidden.shape, dtype=sums if self.wide else hidden.dtype)
        self.dweight = torch.zeros(weight.shape, dtype=sums)
        self.dbias = None if bias is None else torch.zeros(bias.shape, dtype=sums)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        part = self.hidden[rows]
        if self.wide:
            part, total = widened(part), widened(part.new_zeros(part.shape))
            for start in range(0, self.weight.shape[0], _CLASSES_PER_BLOCK):
                block = slice(start, start + _CLASSES_PER_BLOCK)
                total.addmm_(gradient[:, block], widened(self.weight[block]))
                self.dweight[block].addmm_(gradient[:, block].T, part)
            self.dhidden[rows] = total
        else:
            narrow = gradient.to(self.hidden.dtype)
            self.dhidden[rows] = narrow @ self.weight
            if self.dweight.dtype == narrow.dtype:
                self.dweight.addmm_(narrow.T, part)
            else:
                self.dweight += narrow.T @ part
        if self.dbias is not None:
            self.dbias += gradient.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.dhidden, self.dweight, self.dbias


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

    Those of weight and bias, and in float16 that of hidden, stay in the dtype that sums are taken
    in: the upstream factor is yet to come, and they are rounded once, after it.
    """
    rows = _supervised(target, ignore_index, weight.shape[0], max_supervised)
    dtype = widened(hidden[:0]).dtype
    losses, lses = torch.zeros(target.shape, dtype=dtype), torch.zeros(target.shape, dtype=dtype)
    gradients = _Gradients(hidden, weight, bias) if compute_grads else None
    factor = 1 / max(1, len(rows)) if reduction == "mean" else 1.0
    for chunk in _chunks(rows, weight.shape[0]):
        logits, slope = _logits(hidden[chunk], weight, bias, softcap)
        losses[chunk], lse = _losses(logits, target[chunk], label_smoothing, z_loss)
        lses[chunk] = lse
        if gradients is not None:
            factors = lse.new_full((len(chunk), 1), factor)
            gradient = _logit_gradients(
                logits, slope, target[chunk], lse, factors, label_smoothing, z_loss
            )
            gradients.add(chunk, gradient)
    loss = losses
    if reduction != "none":
        loss = losses.sum(dtype=torch.float64).to(dtype)  # rounded once, however many rows
    if reduction == "mean":
        loss = loss / len(rows) if len(rows) else torch.full_like(loss, torch.nan)
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
    """Return the gradients of hidden, weight and bias, with the logits computed a second time."""
    rows = _supervised(target, ignore_index, weight.shape[0], max_supervised)
    gradients = _Gradients(hidden, weight, bias)
    if reduction == "mean":
        dloss = dloss / max(1, len(rows))
    factors = dloss.to(lse.dtype).expand(target.shape)
    for chunk in _chunks(rows, weight.shape[0]):
        logits, slope = _logits(hidden[chunk], weight, bias, softcap)
        parts = (target[chunk], lse[chunk], factors[chunk, None])
        gradients.add(chunk, _logit_gradients(logits, slope, *parts, label_smoothing, z_loss))
    dhidden, dweight, dbias = gradients.results()
    return (
        dhidden.to(hidden.dtype),
        dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )
