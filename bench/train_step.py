"""A training step of the reference Transformer on packed tokens against torch.nn on padded batches.

Both start from the same padded batch, half of it padding, and from the same weights, and end with
the loss and every gradient; packing is part of the step. torch.nn gets padding masks, a causal mask
with the promise that it is one, and no norm behind its stacks, which the paper has not either. The
results are compared in evaluation mode, where both drop nothing, and timed in training mode.

FLOP: 6 * (weights that a real token meets) summed over real tokens; attention's products left out.
"""

import copy

import torch
from torch import Tensor, nn

from fuseformer.models import CausalLM, EncoderDecoder, ModelConfig, Sequences
from fuseformer.models.plain import IGNORED, PlainModel, as_torch
from fuseformer.packing import pack, plan_packing

from .timer import Candidate, Result, Row, compare, verify

FLOP_FORMULA = "6 * (weights that a real token meets) * real tokens, attention left out"


class Padded:
    """A batch of `batch` rows, lengths even from 1 to `length`, with the targets to predict."""

    def __init__(self, batch: int, length: int, vocab_size: int, device: str) -> None:
        lengths = torch.linspace(1, length, batch).round().long()[torch.randperm(batch)]
        self.padding = torch.arange(length) >= lengths[:, None]  # (B, S), True at padding
        ids, targets = torch.randint(vocab_size, (2, batch, length))
        self.ids = ids.masked_fill(self.padding, 0).to(device)
        self.targets = targets.masked_fill(self.padding, IGNORED).to(device)
        self.padding = self.padding.to(device)
        self.real = int(lengths.sum())

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Sequences]:
        plan = plan_packing(self.padding)
        where = Sequences(plan.cu_seqlens, plan.max_seqlen)
        return pack(self.ids, plan), plan.positions(), pack(self.targets, plan), where


def run(quick: bool, device: str, dtype: torch.dtype) -> list[Row]:
    """Return the timings of every model, with and without dropout."""
    rows = []
    for kind in (EncoderDecoder, CausalLM):
        for dropout in (0.0, 0.1):
            rows += _case(kind, dropout, quick, device, dtype)
    return rows


def _case(
    kind: type[EncoderDecoder] | type[CausalLM],
    dropout: float,
    quick: bool,
    device: str,
    dtype: torch.dtype,
) -> list[Row]:
    torch.manual_seed(0)
    batch, length = (4, 16) if quick else (16, 128)
    config = ModelConfig(4096, 256, 4, 4, 1024, length, dropout)
    if quick:
        config = ModelConfig(100, 32, 2, 1, 64, length, dropout)
    model = kind(config).to(device, dtype)
    target = Padded(batch, length, config.vocab_size, device)
    source = Padded(batch, length, config.vocab_size, device) if kind is EncoderDecoder else None
    twin = PlainModel(model)

    def fused() -> Result:
        ids, positions, targets, where = target.packed()
        if isinstance(model, CausalLM):
            loss = model.loss(ids, positions, targets, where)
        else:
            assert source is not None
            source_ids, source_positions, _, source_where = source.packed()
            sources = (source_ids, source_positions, source_where)
            loss = model.loss(*sources, ids, positions, targets, where)
        return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))

    def plain(twin: PlainModel = twin) -> Result:
        sources = (source.ids, source.padding) if source else ()
        loss = twin.loss(target.ids, target.targets, target.padding, *sources)
        return (loss.detach(), *torch.autograd.grad(loss, list(twin.parameters())))

    def fused_as_torch() -> Result:
        loss, *gradients = fused()
        named = as_torch(dict(zip(dict(model.named_parameters()), gradients, strict=True)))
        return (loss, *(named[name] for name, _ in twin.named_parameters()))

    model.eval(), twin.eval()
    exact = copy.deepcopy(twin).double()
    verify([Candidate("fuseformer", fused_as_torch)], lambda: plain(exact), plain())
    model.train(), twin.train()
    flops = 6 * _weights_met(model, target.real, source.real if source else 0)
    return compare(
        f"{kind.__name__}, dropout {dropout:g}, {batch} rows of at most {length}",
        [Candidate("torch.nn", plain), Candidate("fuseformer", fused)],
        flops=flops,
        repetitions=3 if quick else 7,
        device=device,
        warmup=1,
    )


def _weights_met(model: nn.Module, targets: int, sources: int) -> int:
    """Return how many weights the real tokens meet, summed over them."""
    total = 0
    for name, parameter in model.named_parameters():
        reads_source = name.startswith("encoder") or ".kv_proj" in name
        total += parameter.numel() * (sources if reads_source else targets)
    return total
