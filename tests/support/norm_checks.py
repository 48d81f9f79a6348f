"""What the norm kernels must satisfy; each check raises `AssertionError` where one does not.

`kernels` is the kernel module, or a copy of it with a planted bug.
"""

from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from block_checks import SEED, Results, differentiate, judge, without_absent
from torch import Tensor

from fuseformer import reference
from fuseformer.philox import keep_mask


@dataclass(frozen=True)
class NormCase:
    """A call: sizes, dtypes of rows and parameters, and the spread of the rows' values.

    `programs`, unless 0, replaces the greatest number of those that share the backward pass. `rms`
    is an RMS norm; `pre` returns the sum too, which gets no gradient where it is `unused`.
    """

    tokens: int
    width: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    bias: bool = True
    spread: float = 1.0
    programs: int = 0
    rms: bool = False
    pre: bool = False
    unused: bool = False

    def __str__(self) -> str:
        dtypes = (self.dtype, self.parameter_dtype or self.dtype)
        names = "-".join(str(d).removeprefix("torch.") for d in dtypes)
        special = "" if self.spread == 1 else f"-spread{self.spread:g}"
        special += f"-programs{self.programs}" * bool(self.programs)
        special += "-unused" * self.unused
        kind = f"{'pre' if self.pre else 'post'}-{'rms' if self.rms else 'layer'}"
        special = f"{'-bias' * self.bias}-{self.dropout_p}{special}"
        return f"{kind}-{names}-{self.tokens}x{self.width}{special}"


def check_norm(kernels: ModuleType, case: NormCase) -> None:
    """Forward and backward against the oracle, and repeated."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = {name: draw(case.width, case.tokens).T * case.spread for name in ("x", "residual")}
    parameters = {"weight": draw(case.width).abs() + 0.5}
    if case.bias and not case.rms:
        parameters["bias"] = draw(case.width)
    tensors = {name: t.to(case.dtype) for name, t in rows.items()}
    tensors |= {n: t.to(case.parameter_dtype or case.dtype) for n, t in parameters.items()}
    upstream = {"y": draw(case.tokens, case.width).to(case.dtype)}
    if case.pre and not case.unused:
        upstream["total"] = draw(case.tokens, case.width).to(case.dtype)
    seed = torch.tensor(SEED) if case.dropout_p else None
    eps = 1e-5

    def run() -> Results:
        x, residual, weight = (tensors[name] for name in ("x", "residual", "weight"))
        bias = tensors.get("bias")
        y, total, *saved = kernels.add_norm_forward(
            x, residual, weight, bias, seed, case.rms, case.pre, eps, case.dropout_p
        )
        assert (saved[0] is None) == case.rms
        summands = (total, None) if case.pre else (x, residual)
        dy, dtotal = upstream["y"], upstream.get("total")
        dx, dresidual, dweight, dbias = kernels.add_norm_backward(
            dy, dtotal, *summands, weight, *saved, seed, case.dropout_p, bias is not None
        )
        assert (dx is None) == (seed is None)
        dx = dresidual if dx is None else dx
        gradients = {"dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias}
        return without_absent(y=y, total=total, **gradients)

    def oracle(dtype: torch.dtype) -> Results:
        # In low precision the parameters keep theirs: that is the call which plain PyTorch makes.
        leaves = {
            name: (t.to(dtype) if dtype == torch.float64 else t.clone()).requires_grad_()
            for name, t in tensors.items()
        }
        results = reference.add_norm(
            leaves["x"],
            leaves["residual"],
            leaves["weight"],
            leaves.get("bias"),
            rms=case.rms,
            return_residual=case.pre,
            eps=eps,
            dropout_p=case.dropout_p,
            seed=seed,
        )
        named = dict(zip(("y", "total"), results, strict=False))
        losses = [(named[name] * gradient.to(dtype)).sum() for name, gradient in upstream.items()]
        return {**named, **differentiate(sum(losses, torch.zeros(())), leaves)}

    programs = case.programs or kernels._BACKWARD_PROGRAMS
    with mock.patch.object(kernels, "_BACKWARD_PROGRAMS", programs):
        judge(run, oracle, case.dtype)


def check_norm_of_the_sum(kernels: ModuleType) -> None:
    """What is normalised is the sum that is returned: rounded to its dtype, not as it was before.

    The norm of the other would be nearer to the oracle's. One in a hundred elements may be rounded
    to the other side.
    """
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 33, 72, generator=generator).bfloat16().unbind()
    weight = torch.ones(72)
    for rms in (False, True):
        y, total, *_ = kernels.add_norm_forward(
            x, residual, weight, None, None, rms, True, 1e-5, 0.0
        )
        assert torch.equal(total, x + residual)
        (expected,) = reference.add_norm(
            0 * total, total, weight, None, rms=rms, return_residual=False, eps=1e-5
        )
        assert (y != expected).sum() <= y.numel() / 100


def check_norm_dropout(
    kernels: ModuleType, tokens: int, width: int, dropout_p: float, pre: bool = False
) -> None:
    """The keep decision of every element, both ways, is that of the definition.

    x is 1 and the residual 0, so that y is above 0 where x was kept and below where not; the
    gradient of the sum is nowhere 0, and dx is 0 only where x was dropped.
    """
    seed = torch.tensor(2**40 + 17)
    keep = keep_mask(seed, dropout_p, range(1), range(1, 2), range(tokens), width)[0, 0]
    x, weight = torch.ones(tokens, width), torch.ones(width)
    residual = torch.zeros_like(x)
    y, total, mean, rstd = kernels.add_norm_forward(
        x, residual, weight, None, seed, False, pre, 1e-5, dropout_p
    )
    assert torch.equal(y > 0, keep), "forward pass"
    dy = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    summands = (total, None) if pre else (x, residual)
    dx, dresidual, _, _ = kernels.add_norm_backward(
        dy, None, *summands, weight, mean, rstd, seed, dropout_p, False
    )
    assert dresidual.all()
    assert torch.equal(dx != 0, keep), "dx"
