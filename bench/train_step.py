"""A training step of the reference Transformer on packed tokens against torch.nn on padded batches.

Both start from the same padded batch, half of it padding, and from the same weights, and end with
the loss and every gradient; packing is part of the step. torch.nn gets padding masks, a causal mask
with the promise that it is one, and no norm behind its stacks, which the paper has not either. The
results are compared in evaluation mode, where both drop nothing, and timed in training mode.

FLOP: 6 * (weights that a real token meets) summed over real tokens; attention's products left out.
"""

import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseformer.models import CausalLM, EncoderDecoder, ModelConfig, Sequences
from fuseformer.packing import pack, plan_packing

from .timer import Candidate, Result, Row, compare, verify

FLOP_FORMULA = "6 * (weights that a real token meets) * real tokens, attention left out"
IGNORED = -100


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


class TorchTransformer(nn.Module):
    """The same model of torch.nn's parts: nn.Transformer, or its encoder alone, made causal."""

    table: Tensor

    def __init__(self, config: ModelConfig, table: Tensor, with_decoder: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("table", table)
        sizes = (config.width, config.heads, config.hidden, config.dropout, config.activation)
        layer = nn.TransformerEncoderLayer(*sizes, batch_first=True)
        encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.stack: nn.Module = encoder
        if with_decoder:
            decoder_layer = nn.TransformerDecoderLayer(*sizes, batch_first=True)
            decoder = nn.TransformerDecoder(decoder_layer, config.layers)
            self.stack = nn.Transformer(
                *sizes[:2], custom_encoder=encoder, custom_decoder=decoder, batch_first=True
            )

    def embed(self, ids: Tensor) -> Tensor:
        scaled = self.embedding(ids) * self.embedding.embedding_dim**0.5
        return self.dropout(scaled + self.table[: ids.shape[1]])

    def loss(self, batch: Padded, source: Padded | None) -> Tensor:
        length, x = batch.ids.shape[1], self.embed(batch.ids)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        if source is None:
            hidden = self.stack(x, causal, batch.padding, is_causal=True)
        else:
            hidden = self.stack(
                self.embed(source.ids),
                x,
                tgt_mask=causal,
                src_key_padding_mask=source.padding,
                tgt_key_padding_mask=batch.padding,
                memory_key_padding_mask=source.padding,
                tgt_is_causal=True,
            )
        logits = F.linear(hidden, self.embedding.weight).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)


_NAMES = (
    (r"^embedding\.tokens", "embedding"),
    (r"^blocks", "stack.layers"),
    (r"^(en|de)coder", r"stack.\1coder.layers"),
    (r"cross_attention\.out_proj", "multihead_attn.out_proj"),
    (r"cross_attention\.(q|kv)_proj\.", "multihead_attn.in_proj_"),
    (r"attention\.out_proj", "self_attn.out_proj"),
    (r"attention\.in_proj\.", "self_attn.in_proj_"),
    (r"(decoder.*)feed_forward_norm", r"\1norm3"),
    (r"cross_attention_norm|feed_forward_norm", "norm2"),
    (r"attention_norm", "norm1"),
    (r"feed_forward\.", ""),
)


def as_torch(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our named weights, or their gradients, with the names and shapes of torch.nn."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in ours.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}  # queries, keys and values


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
    twin = TorchTransformer(config, model.embedding.positions.clone(), source is not None)
    twin.load_state_dict({**as_torch(model.state_dict()), "table": twin.table})
    twin = twin.to(device, dtype)

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

    def plain(twin: TorchTransformer = twin) -> Result:
        loss = twin.loss(target, source)
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
