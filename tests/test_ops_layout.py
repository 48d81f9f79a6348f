"""What an op's fake promises of its results' layout, the op keeps: compiled code counts on it."""

import pytest
import torch
from fakes import FakesAgree
from op_calls import CALLS

import fuseformer as ff


def transposed(x):
    """Return `x` with the memory of its last but one and the dimension before it exchanged.

    The last dimension of attention's tensors has stride 1; matrices lie in columns.
    """
    dims = (-3, -2) if x.dim() >= 3 else (-2, -1)
    if x.dim() < 2:
        return x
    return x.transpose(*dims).contiguous().transpose(*dims)


def check(name, backend):
    call, inputs = CALLS[name]
    torch.manual_seed(0)
    leaves = [transposed(x).detach().requires_grad_() for x in inputs()]
    agree = FakesAgree()
    with agree:
        out = call(*leaves, backend)
        torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves)
    assert agree.seen


@pytest.mark.parametrize("name", CALLS)
def test_the_cpu_keeps_what_fakes_promise(name):
    check(name, "cpu")


@pytest.mark.parametrize("name", CALLS)
def test_triton_keeps_what_fakes_promise(name, triton_on_cpu):
    check(name, "triton")


def test_a_broken_promise_is_seen(monkeypatch):
    from fuseformer.cpu import attention

    whole = attention.attention_forward
    monkeypatch.setattr(
        attention, "attention_forward", lambda *a: tuple(x.mT.contiguous().mT for x in whole(*a))
    )
    q = torch.randn(1, 2, 5, 8)
    with FakesAgree(), pytest.raises(AssertionError, match="attention"):
        ff.attention(q, q, q)


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_of_a_matrix_that_lies_in_columns(gated):
    x, w, down = torch.randn(16, 6).T, torch.randn(24, 16), torch.randn(16, 24)
    leaves = [t.detach().requires_grad_() for t in (x, w, down)]
    agree = FakesAgree()
    with agree:
        x, w, down = leaves
        if gated:
            y = ff.gated_feed_forward(x, w, w, down)
        else:
            y = ff.feed_forward(x, w, None, down, None)
        torch.autograd.grad(y.sum(), leaves)
    assert len(agree.seen) == 2
