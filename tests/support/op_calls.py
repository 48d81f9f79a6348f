"""One call of each public op and its floating inputs, for tests that hold ops against others."""

import torch

import fuseformer as ff


def angles():
    angle = torch.arange(33.0)[:, None] / torch.arange(1.0, 9.0)
    return angle.cos(), angle.sin()


#: Name -> (call of the inputs and a backend, what makes the inputs).
CALLS = {
    "attention": (
        lambda q, k, v, backend: ff.attention(
            q,
            k,
            v,
            causal=True,
            key_lengths=torch.tensor([37, 0], dtype=torch.int32),
            dropout_p=0.2,
            seed=3,
            backend=backend,
        ),
        lambda: [torch.randn(2, 4, 33, 24), *(torch.randn(2, 2, 50, 24) for _ in range(2))],
    ),
    "attention with a bias": (
        lambda q, k, v, bias, sinks, backend: ff.attention(
            q,
            k,
            v,
            causal="bottom_right",
            window=(20, -1),
            softcap=8.0,
            bias=bias,
            sinks=sinks,
            alibi_slopes=torch.linspace(0.5, 0.02, 16),
            backend=backend,
        ),
        # Many heads: of a few sinks, PyTorch's own error may happen to be next to nothing.
        lambda: [
            torch.randn(1, 16, 33, 24),
            *(torch.randn(1, 8, 50, 24) for _ in range(2)),
            torch.randn(16, 33, 50),
            torch.randn(16),
        ],
    ),
    "varlen_attention": (
        lambda q, k, v, backend: ff.varlen_attention(
            q,
            k,
            v,
            *[torch.tensor([0, 9, 9, 40], dtype=torch.int32)] * 2,
            31,
            31,
            causal="bottom_right",
            backend=backend,
        ),
        lambda: [torch.randn(40, 4, 24), *(torch.randn(40, 2, 24) for _ in range(2))],
    ),
    "varlen_attention with a bias": (
        lambda q, k, v, bias, backend: ff.varlen_attention(
            q,
            k,
            v,
            *[torch.tensor([0, 9, 9, 40], dtype=torch.int32)] * 2,
            31,
            31,
            bias=bias,
            softcap=8.0,
            backend=backend,
        ),
        lambda: [
            torch.randn(40, 4, 24),
            *(torch.randn(40, 2, 24) for _ in range(2)),
            torch.randn(4, 31, 31),
        ],
    ),
    "feed_forward": (
        lambda x, w1, b1, w2, b2, backend: ff.feed_forward(
            x, w1, b1, w2, b2, activation="gelu", dropout_p=0.2, seed=3, backend=backend
        ),
        lambda: [
            torch.randn(2, 19, 40),
            torch.randn(72, 40) / 6,
            torch.randn(72),
            torch.randn(40, 72) / 8,
            torch.randn(40),
        ],
    ),
    "gated_feed_forward": (
        lambda x, w1, w2, w3, backend: ff.gated_feed_forward(
            x, w1, w2, w3, dropout_p=0.2, seed=3, backend=backend
        ),
        lambda: [
            torch.randn(2, 19, 40),
            *(torch.randn(72, 40) / 6 for _ in range(2)),
            torch.randn(40, 72) / 8,
        ],
    ),
    "linear_cross_entropy": (
        lambda h, w, backend: ff.linear_cross_entropy(
            h,
            w,
            torch.tensor([3, -100, 0, 100, 5] * 5),
            label_smoothing=0.1,
            z_loss=1e-2,
            backend=backend,
        ),
        lambda: [torch.randn(25, 24), torch.randn(101, 24) / 4],
    ),
    "rotary": (
        lambda q, k, backend: torch.cat(
            ff.rotary(q, k, *angles(), interleaved=True, backend=backend), 1
        ),
        lambda: [torch.randn(2, 4, 33, 24), torch.randn(2, 2, 33, 24)],
    ),
    "add_rms_norm": (
        lambda x, r, w, backend: torch.stack(
            ff.add_rms_norm(x, r, w, eps=1e-6, dropout_p=0.2, seed=3, backend=backend)
        ),
        lambda: [torch.randn(21, 72), torch.randn(21, 72), torch.rand(72) + 0.5],
    ),
    "add_layer_norm": (
        lambda x, r, w, b, backend: ff.add_layer_norm(
            x, r, w, b, dropout_p=0.2, seed=3, backend=backend
        ),
        lambda: [torch.randn(21, 72), torch.randn(21, 72), torch.rand(72) + 0.5, torch.randn(72)],
    ),
    "add_layer_norm without parameters": (
        lambda x, r, backend: ff.add_layer_norm(x, r, None, None, backend=backend),
        lambda: [torch.randn(21, 72), torch.randn(21, 72)],
    ),
    "add_layer_norm with a bias only": (
        lambda x, r, b, backend: torch.stack(
            ff.add_layer_norm(x, r, None, b, return_residual=True, backend=backend)
        ),
        lambda: [torch.randn(21, 72), torch.randn(21, 72), torch.randn(72)],
    ),
    "add_rms_norm without a weight": (
        lambda x, r, backend: torch.stack(
            ff.add_rms_norm(x, r, None, eps=1e-6, dropout_p=0.2, seed=3, backend=backend)
        ),
        lambda: [torch.randn(21, 72), torch.randn(21, 72)],
    ),
}
