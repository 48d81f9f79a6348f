"""Gradients under loss scales from 1 to 2**24, and the form of the loss that waits for nothing.

The rule compares with plain PyTorch in the same dtype. Where its own gradient of the logits leaves
the range of float16, it has no error to compare with: that of the largest scale at which it is
finite, times the rest of the scale, takes its place. What float16 cannot hold must be infinite.
"""

import pytest
import torch
import torch.nn.functional as F
from op_calls import CALLS
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LARGEST = 65504
SCALES = (1, 2**8, 2**15, 2**16, 2**20, 2**24)


def inputs(weight_size=0.02):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (33, 50))
    bias = torch.randn(50, generator=generator)
    target = torch.randint(50, (33,), generator=generator)
    target[::3] = -100
    return [hidden, weight * weight_size, bias], target


def gradients(loss_of, tensors, dtype, scale):
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    return torch.autograd.grad((loss_of(*leaves) * scale).sum(), leaves)


def judge(actual, exact, low):
    """Hold gradients to the rule, and infinities to what float16 cannot hold."""
    for name, got, wanted, plain in zip(("dh", "dw", "db"), actual, exact, low, strict=True):
        wanted = wanted.double()
        if got.dtype == FP16:
            over = wanted.abs() > LARGEST * 1.01
            assert torch.equal(got[over].double(), wanted[over].sign() * torch.inf), name
            unsure = wanted.abs() > LARGEST * 0.99
            got, wanted, plain = (t.double().masked_fill(unsure, 0.0) for t in (got, wanted, plain))
        assert_close_to_reference(got, wanted, plain, factor=3.0, name=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_under_every_scale(backend, dtype, reduction, z_loss):
    tensors, target = inputs()
    tensors = [t.to(dtype) for t in tensors]

    def plain(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, target, reduction="none")
        lse = logits.logsumexp(-1).where(target != -100, 0.0)
        loss = loss + z_loss * lse.square()
        if reduction == "none":
            return loss
        return loss.sum() / ((target != -100).sum() if reduction == "mean" else 1)

    def fused(hidden, weight, bias):
        options = {"z_loss": z_loss, "reduction": reduction, "backend": backend}
        return ff.linear_cross_entropy(hidden, weight, target, bias=bias, **options)

    last = None
    for scale in SCALES:
        low = gradients(plain, tensors, dtype, scale)
        if all(g.isfinite().all() for g in low):
            last = scale, [g.double() for g in low]
        low = [g * (scale / last[0]) for g in last[1]]
        exact = gradients(plain, tensors, torch.float64, scale)
        judge(gradients(fused, tensors, dtype, scale), exact, low)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_infinite_scale_is_seen(backend, reduction):
    """A gradient scaler lowers its scale because gradients are not finite."""
    tensors, target = inputs()

    def fused(hidden, weight, bias):
        options = {"reduction": reduction, "backend": backend}
        return ff.linear_cross_entropy(hidden, weight, target, bias=bias, **options)

    for gradient in gradients(fused, tensors, FP16, torch.inf):
        assert not gradient.isfinite().all()


class NoWait(TorchDispatchMode):
    """Raises where a result depends on values, for which a host must wait."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.FORBIDDEN[1:]) or name == self.FORBIDDEN[0]:
            raise AssertionError(f"{name} waits for the device")
        booleans = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if booleans:
            raise AssertionError(f"{name} by a mask waits for the device")
        ours = OPDEFS.get(func._schema.name)
        if ours is None:
            return func(*args, **(kwargs or {}))
        with self, torch.no_grad():  # a mode does not see into a custom op
            return ours._init_fn(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_bound_of_the_rows_that_count_makes_waiting_needless(reduction):
    tensors, target = inputs(0.5)
    counted = int((target != -100).sum())

    def run(bound, chosen="triton"):
        def fused(hidden, weight, bias):
            options = {"reduction": reduction, "max_supervised": bound, "backend": chosen}
            return ff.linear_cross_entropy(hidden, weight, target, bias=bias, **options)

        leaves = [t.clone().requires_grad_() for t in tensors]
        loss = fused(*leaves)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    expected = run(None)
    for bound in (counted, counted + 3, 33, 1000):
        with NoWait():
            results = run(bound)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="nonzero waits"), NoWait():
        run(None)
    for bound in (counted - 1, 0):
        loss, *_ = run(bound)
        assert loss.isnan().all()
        assert run(bound, "reference")[0].isnan().all()
        with pytest.raises(ValueError, match=f"max_supervised: got {bound}, expected at least"):
            run(bound, "cpu")
    loss, *found = run(counted - 1)
    assert all(g.isnan().any() for g in found)


@pytest.mark.parametrize(
    ("bound", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_a_bound_is_a_count(bound, error):
    tensors, target = inputs()
    with pytest.raises(error, match="max_supervised: got"):
        ff.linear_cross_entropy(*tensors[:2], target, max_supervised=bound)


@pytest.mark.parametrize("exponent", [-20, 8])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_every_op_takes_small_and_large_incoming_gradients(name, backend, exponent):
    """float16 gradients as loss scaling brings them; the slack of the rule is scaled with them.

    What float16 cannot hold on the way to a gradient is infinite in PyTorch too: the incoming
    gradients are as large as PyTorch itself takes at every step, and as small as they come.
    """
    call, make = CALLS[name]
    torch.manual_seed(0)
    tensors = [t.half() for t in make()]
    scale = 2.0**exponent
    shape = call(*tensors, backend="reference").shape
    incoming = (torch.randn(shape) * scale).half() if shape else torch.tensor(scale)

    def run(dtype, backend):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        y = call(*leaves, backend=backend)
        return torch.autograd.grad(y, leaves, incoming.to(y.dtype))

    results = (run(FP16, backend), run(torch.float64, "reference"), run(FP16, "reference"))
    for place, parts in enumerate(zip(*results, strict=True)):
        assert parts[2].isfinite().all(), "PyTorch has no error to compare with"
        got, exact, low = (g.double() / min(scale, 1.0) for g in parts)
        assert_close_to_reference(got, exact, low, factor=3.0, name=f"gradient {place}")
