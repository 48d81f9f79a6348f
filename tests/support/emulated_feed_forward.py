"""The CUDA C++ feed-forward kernels in the emulator, called with torch tensors."""

from dataclasses import dataclass
from types import ModuleType

import torch
from emulated import Ops
from torch import Tensor

from fuseformer import reference
from fuseformer.philox import dropout_scale, dropout_threshold
from fuseformer.testing import assert_close_to_reference


class FeedForward:
    """The resident forward pass on the CPU, by an emulator that was built in some mode."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.ops = Ops(emulator)

    @property
    def counters(self) -> dict[str, int]:
        """What the last launch did."""
        return self.ops.counters

    def __call__(
        self,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        *,
        activation: str,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return what `fuseformer.reference.feed_forward` does. Raises `EmulatorError`."""
        # NaN is seen as what nobody has written, here and in what comes back.
        y = torch.full_like(x, torch.nan) if y is None else y
        tensors = (x, w1, b1, w2, b2, y, seed if dropout_p > 0 else None)
        dropout = (dropout_threshold(dropout_p), dropout_scale(dropout_p))
        self.ops.feed_forward_forward(*tensors, activation, *dropout)
        return y


class Backward:
    """The resident backward pass on the CPU, with a number of splits that is asked for."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.ops = Ops(emulator)

    @property
    def counters(self) -> dict[str, int]:
        """What the last call did."""
        return self.ops.counters

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        *,
        activation: str,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        splits: int = 1,
        **changed: Tensor,
    ) -> dict[str, Tensor]:
        """Return the gradients by name, those of biases if there are any. Raises `EmulatorError`.

        Of `changed`, results and workspaces take the place of those that are made here.
        """
        (tokens, width), hidden = x.shape, w1.shape[0]
        step = self.ops.feed_forward_step_tokens(x) or 1
        # NaN is seen as what nobody has written, here and in what comes back.
        results = {
            "dx": torch.full(x.shape, torch.nan, dtype=x.dtype),
            "dw1": torch.full(w1.shape, torch.nan, dtype=x.dtype),
            "db1": None if b1 is None else torch.full((hidden,), torch.nan, dtype=x.dtype),
            "dw2": torch.full(w2.shape, torch.nan, dtype=x.dtype),
        }
        workspaces = {
            # As many sums of dx as splits of the tokens, so that tests have several of both.
            "dx_sums": torch.zeros(splits, -(-tokens // step), step, width),
            "turns": torch.zeros(splits, -(-tokens // step), dtype=torch.int32),
            "weight_sums": torch.full((splits, 2, hidden, width), torch.nan),
            "bias_sums": torch.full((splits, hidden), torch.nan),
        }
        given = {name: changed.get(name, t) for name, t in (results | workspaces).items()}
        drops = seed if dropout_p > 0 else None
        dropout = (dropout_threshold(dropout_p), dropout_scale(dropout_p))
        self.ops.feed_forward_backward(
            dy, x, w1, b1, w2, *given.values(), drops, activation, *dropout
        )
        return {name: given[name] for name in results if given[name] is not None}


@dataclass(frozen=True)
class Case:
    """One call, with inputs by a fixed seed."""

    tokens: int
    width: int
    hidden: int
    dtype: torch.dtype
    activation: str = "relu"
    biases: str = "both"  # "both", "b1", "b2" or "none"
    dropout_p: float = 0.0

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Return x, w1, b1, w2 and b2, scaled so that no layer swamps the next."""
        torch.manual_seed(0)
        x = torch.randn(self.tokens, self.width)
        w1 = torch.randn(self.hidden, self.width) * self.width**-0.5
        w2 = torch.randn(self.width, self.hidden) * max(self.hidden, 1) ** -0.5
        b1 = torch.randn(self.hidden) if self.biases in ("both", "b1") else None
        b2 = torch.randn(self.width) if self.biases in ("both", "b2") else None
        return tuple(None if t is None else t.to(self.dtype) for t in (x, w1, b1, w2, b2))

    def dy(self) -> Tensor:
        """Return the gradient of the output."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.tokens, self.width, generator=generator).to(self.dtype)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f"-dropout{self.dropout_p}" if self.dropout_p else ""
        shape = f"{self.tokens}x{self.width}x{self.hidden}"
        return f"{shape}-{dtype}-{self.activation}-{self.biases}{dropout}"


def check(feed_forward: FeedForward, case: Case) -> None:
    """Raise an `AssertionError` for whatever is wrong with a case."""
    inputs = case.inputs()
    options = {
        "activation": case.activation,
        "dropout_p": case.dropout_p,
        "seed": torch.tensor(0x123456789AB),
    }
    actual = feed_forward(*inputs, **options)
    wide = (None if t is None else t.double() for t in inputs)
    exact = reference.feed_forward(*wide, **options)
    assert_close_to_reference(actual, exact, reference.feed_forward(*inputs, **options))
    assert feed_forward.counters["ldmatrix_conflicts"] == 0, "bank conflicts"
    assert feed_forward.counters["shared_conflicts"] == 0, "bank conflicts of plain accesses"


def check_backward(backward: Backward, case: Case, splits: int = 1) -> None:
    """Raise an `AssertionError` for whatever is wrong with the gradients of a case."""
    x, w1, b1, w2, _ = case.inputs()
    options = {
        "activation": case.activation,
        "dropout_p": case.dropout_p,
        "seed": torch.tensor(0x123456789AB),
    }
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2}

    def oracle(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {
            name: None if t is None else t.to(dtype).requires_grad_() for name, t in tensors.items()
        }
        y = reference.feed_forward(*leaves.values(), None, **options)
        given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad((y * case.dy().to(dtype)).sum(), list(given.values()))
        return dict(zip(given, gradients, strict=True))

    actual = backward(case.dy(), *tensors.values(), **options, splits=splits)
    exact, low = oracle(torch.float64), oracle(case.dtype)
    assert actual.keys() == {f"d{name}" for name in exact}
    for name, wanted in exact.items():
        got = actual[f"d{name}"]
        assert_close_to_reference(got, wanted, low[name], factor=3.0, name=f"d{name}")
    assert backward.counters["ldmatrix_conflicts"] == 0, "bank conflicts"
    assert backward.counters["shared_conflicts"] == 0, "bank conflicts of plain accesses"


def check_infinite_gradient(backward: Backward, width: int) -> None:
    """An infinite gradient must not meet units past the last, where it would become NaN."""
    case = Case(9, width, 72, torch.bfloat16, biases="none")
    x, w1, _, w2, _ = case.inputs()
    dy = case.dy()
    dy[2, 0] = torch.inf
    # All that is infinite has one sign.
    gradients = backward(dy, x.abs(), w1.abs() + 0.1, None, w2.abs() + 0.1, activation="relu")
    assert (gradients["dx"][2] == torch.inf).all(), "dx of the infinite row"
    assert torch.cat((gradients["dx"][:2], gradients["dx"][3:])).isfinite().all(), "other rows"
