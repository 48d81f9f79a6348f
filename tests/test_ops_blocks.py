"""Feed-forward, norm, loss and rotary ops: the CPU backend against the oracle, and the contract."""

import pytest
import torch
import torch._dynamo.testing
from block_checks import check_no_columns

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def judge(function, tensors, dtype):
    """Compare `function` on the CPU backend with the oracle, its outputs and all gradients."""
    results = []
    runs = (("cpu", dtype), ("reference", torch.float64), ("reference", dtype))
    for backend, precision in runs:
        torch.manual_seed(1)
        leaves = [
            t.to(dtype).to(precision, copy=True).requires_grad_() if t.is_floating_point() else t
            for t in tensors
        ]
        outs = function(*leaves, backend=backend)
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum((o * torch.randn(o.shape, dtype=torch.float64)).sum() for o in outs)
        floating = [t for t in leaves if t.is_floating_point()]
        results.append((outs, torch.autograd.grad(loss, floating)))
    (outs, grads), (exact, exact_grads), (low, low_grads) = results
    for a, e, b in zip(outs, exact, low, strict=True):
        assert a.dtype in (dtype, torch.float32)
        assert_close_to_reference(a, e, b, name="output")
    for i, (a, e, b) in enumerate(zip(grads, exact_grads, low_grads, strict=True)):
        assert_close_to_reference(a, e, b, factor=3, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("rows", "biases", "p"), [(1, True, 0), (63, True, 0.3), (37, False, 0)])
def test_feed_forward(dtype, activation, rows, biases, p):
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(rows, 40), torch.randn(72, 40) / 6, torch.randn(24, 72) / 8
    b = [torch.randn(72), torch.randn(24)] if biases else []

    def call(x, w1, w2, *b, backend):
        b1, b2 = b or (None, None)
        return ff.feed_forward(
            x, w1, b1, w2, b2, activation=activation, dropout_p=p, seed=5, backend=backend
        )

    judge(call, [x, w1, w2, *b], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_gated_feed_forward(dtype, activation, p):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 31, 40), *(torch.randn(72, 40) / 6 for _ in range(2))]
    tensors.append(torch.randn(40, 72) / 8)

    def call(*tensors, backend):
        return ff.gated_feed_forward(
            *tensors, activation=activation, dropout_p=p, seed=5, backend=backend
        )

    judge(call, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 40), (3, 21, 72), (257, 33)], ids=str)
@pytest.mark.parametrize("pre", [False, True])
def test_norms(dtype, p, shape, pre):
    torch.manual_seed(0)
    x, residual = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])

    options = {"dropout_p": p, "seed": 6, "return_residual": pre}

    def layer(x, residual, weight, bias=None, *, backend):
        return ff.add_layer_norm(x, residual, weight, bias, backend=backend, **options)

    def rms(x, residual, weight, *, backend):
        return ff.add_rms_norm(x, residual, weight, eps=1e-6, backend=backend, **options)

    judge(layer, [x, residual, weight, bias], dtype)
    judge(layer, [x, residual, weight], dtype)
    judge(rms, [x, residual, weight], dtype)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_of_a_pre_norm_may_go_unused(norm, used, create_graph):
    torch.manual_seed(0)
    tensors = [leaf(7, 40), leaf(7, 40), leaf(40)]
    options = {"eps": 1e-5, "dropout_p": 0.3, "seed": 6, "return_residual": True}
    gradients = []
    for backend in ("cpu", "reference"):
        if norm == "rms":
            outs = ff.add_rms_norm(*tensors, backend=backend, **options)
        else:
            outs = ff.add_layer_norm(*tensors, None, backend=backend, **options)
        loss = (outs[used] ** 2).sum()
        found = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
        gradients.append([torch.zeros(()) if g is None else g for g in found])
    for a, e in zip(*gradients, strict=True):
        assert torch.allclose(a, e, atol=1e-5)


@pytest.mark.parametrize("return_residual", [False, True])
def test_second_derivatives_of_norms_whose_inputs_depend_on_each_other(return_residual):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 5), (5,)))

    def call(x, weight):
        options = {"eps": 1e-3, "return_residual": return_residual, "backend": "cpu"}
        outs = ff.add_rms_norm(x, x, weight, dropout_p=0.3, seed=6, **options)
        outs = outs if return_residual else (outs,)
        return ff.add_layer_norm(outs[-1] * weight, outs[0], weight, weight, **options)

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    ("smoothing", "softcap", "biased", "z_loss"),
    [(0, None, False, 0), (0.1, 4.0, True, 0), (0, None, False, 1e-2), (0.1, 4.0, True, 1e-3)],
)
def test_linear_cross_entropy(dtype, reduction, smoothing, softcap, biased, z_loss):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 37, 24), torch.randn(101, 24) / 4
    target = torch.randint(0, 101, (3, 37))
    target[0, :20], target[2] = -100, -100

    def call(hidden, weight, *bias, backend):
        return ff.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias[0] if bias else None,
            label_smoothing=smoothing,
            softcap=softcap,
            z_loss=z_loss,
            reduction=reduction,
            backend=backend,
        )

    judge(call, [hidden, weight, *([torch.randn(101)] if biased else [])], dtype)


def test_linear_cross_entropy_without_a_supervised_row_is_that_of_torch():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    target = torch.full((4,), -100)
    assert ff.linear_cross_entropy(hidden, weight, target).isnan()
    total = ff.linear_cross_entropy(hidden, weight, target, reduction="sum")
    total.backward()
    assert total == 0
    assert (hidden.grad == 0).all()


def test_linear_cross_entropy_never_holds_all_logits():
    rows, classes, width = 4096, 8192, 8
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    target[::2] = -100
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        ff.linear_cross_entropy(hidden, weight, target).backward()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) <= 16 * 2**20
    assert max(sizes) < rows * classes * 4 / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_rotary(dtype, batched, interleaved):
    torch.manual_seed(0)
    angle = torch.rand(2, 9, 6) if batched else torch.rand(9, 6)
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)

    def call(q, k, *, backend):
        options = {"interleaved": interleaved, "backend": backend}
        return ff.rotary(q, k, angle.cos(), angle.sin(), **options)

    judge(call, [q, k], dtype)


def test_rotary_keeps_the_layout_and_differentiates_twice():
    q, k = (torch.randn(2, 5, h, 8, dtype=torch.float64).transpose(1, 2) for h in (4, 2))
    angle = torch.rand(5, 3, dtype=torch.float64)
    turned = ff.rotary(q, k, angle.cos(), angle.sin())
    assert [x.stride() for x in turned] == [q.stride(), k.stride()]

    def call(q, k):
        return ff.rotary(q, k, angle.cos(), angle.sin(), interleaved=True)

    leaves = [x[:1, :, :2].clone().requires_grad_() for x in (q, k)]
    angle = angle[:2]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rotary_in_place(backend):
    q, k, angle = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.rand(9, 6)
    tables = (angle.cos(), angle.sin())
    expected = ff.rotary(q, k, *tables, interleaved=True)
    q.requires_grad_()
    with torch.no_grad():
        found = ff.rotary(q, k, *tables, interleaved=True, inplace=True, backend=backend)
    assert found[0] is q
    assert found[1] is k
    torch.testing.assert_close(found, expected, check_stride=False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def turn(q, k, cos, sin):
        q, k = q * 2, k * 2
        return ff.rotary(q, k, cos, sin, inplace=True, backend="cpu")

    q = q.detach()
    torch.testing.assert_close(turn(q, k, *tables), ff.rotary(q * 2, k * 2, *tables))


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


OPCHECKS = {
    "feed_forward": lambda: (
        leaf(5, 8), leaf(6, 8), leaf(6), leaf(8, 6), leaf(8), torch.tensor(3), "gelu", 0.2, True,
        True,
    ),
    "gated_feed_forward": lambda: (
        leaf(5, 8), leaf(6, 8), leaf(6, 8), leaf(8, 6), torch.tensor(3), "silu", 0.2, True,
        True,
    ),
    "post-norm": lambda: (
        leaf(5, 8), leaf(5, 8), leaf(8), leaf(8), None, False, False, 1e-5, 0.0,
    ),
    "pre-norm": lambda: (
        leaf(5, 8), leaf(5, 8), leaf(8), None, torch.tensor(4), True, True, 1e-5, 0.3,
    ),
    "rotary": lambda: (leaf(1, 2, 5, 8), leaf(1, 1, 5, 8), *torch.rand(2, 5, 3), False, True),
    "rotary_inplace": lambda: (
        torch.rand(1, 2, 5, 8), torch.rand(1, 1, 5, 8), *torch.rand(2, 5, 3), True,
    ),
    "linear_cross_entropy": lambda: (
        leaf(5, 8), leaf(7, 8), leaf(7), torch.tensor([1, 6, -100, 0, 2]), -100, 0.1, 0.0, 0.1,
        "mean", True, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op = getattr(torch.ops.fuseformer, "add_norm" if "-norm" in name else name).default
    torch.library.opcheck(op, (*OPCHECKS[name](), "cpu"))


def test_compiles_without_graph_breaks_and_once_for_all_lengths():
    def block(x, residual, w1, w2, weight, target):
        y = ff.feed_forward(x, w1, None, w2, None)
        y = ff.add_layer_norm(y, residual, weight, None)
        y, residual = ff.add_rms_norm(y, residual, weight, eps=1e-6)
        y = ff.gated_feed_forward(y, w1, w1, w2)
        return ff.linear_cross_entropy(y + residual, w1, target)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    compiled_frames = []
    for rows in (6, 10, 15):
        tensors = [leaf(rows, 8), leaf(rows, 8), leaf(12, 8), leaf(8, 12), leaf(8)]
        target = torch.randint(0, 12, (rows,))
        expected = block(*tensors, target)
        loss = compiled(*tensors, target)
        compiled_frames.append(counter.frame_count)
        assert_close_to_reference(loss, expected, expected)
        for a, b in zip(
            torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True
        ):
            assert_close_to_reference(a, b, b)
    assert len(set(compiled_frames)) == 1


def test_autocast_runs_in_its_dtype():
    x, w1, w2, weight = leaf(5, 8), leaf(6, 8), leaf(8, 6), leaf(8)
    for backend in (None, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            outs = [
                ff.feed_forward(x, w1, None, w2, None, backend=backend),
                ff.gated_feed_forward(x, w1, w1, w2, backend=backend),
            ]
            outs += [
                ff.add_layer_norm(*outs, weight, None, backend=backend),
                *ff.add_rms_norm(*outs, weight, eps=1e-5, backend=backend),
            ]
            loss = ff.linear_cross_entropy(x, w1, torch.arange(5), backend=backend)
        assert all(o.dtype == torch.bfloat16 for o in outs)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(sum(o.sum() for o in outs) + loss, (x, w1, w2, weight))
        assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_columns(dtype, backend):
    check_no_columns(backend, dtype)


def test_equal_dropout_masks_on_all_backends():
    x, eye = torch.ones(40, 64), torch.eye(64)
    kept = [
        ff.feed_forward(x, eye, None, eye, None, dropout_p=0.5, seed=2, backend=b) > 0
        for b in ("cpu", "reference")
    ]
    assert torch.equal(*kept)
    assert 0.4 < kept[0].float().mean() < 0.6


X, W, HEADS = torch.zeros(3, 8), torch.zeros(6, 8), torch.zeros(1, 2, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ff.feed_forward(X, W.T, None, W, None), ValueError, r"w1: got shape \(8, 6\)"),
        (lambda: ff.feed_forward(X, W, X, W.T, None), ValueError, "b1: got 2 dimensions"),
        (lambda: ff.feed_forward(X, W, None, W, None), ValueError, r"w2: got shape \(6, 8\)"),
        (lambda: ff.feed_forward(X, W, None, W.T, None, activation="tanh"), ValueError, "'tanh'"),
        (
            lambda: ff.feed_forward(X, W, None, W.T, None, dropout_p=2),
            ValueError,
            "dropout_p: got 2",
        ),
        (lambda: ff.feed_forward(X, W.half(), None, W.T, None), TypeError, "w1: got dtype"),
        (lambda: ff.gated_feed_forward(X, W, W[:5], W.T), ValueError, "w_up: got shape"),
        (lambda: ff.add_layer_norm(X, X[:2], X[0], None), ValueError, "residual: got shape"),
        (lambda: ff.add_layer_norm(X, X, X[0, :3], None), ValueError, "weight: got shape"),
        (lambda: ff.add_rms_norm(X, X, X[0], eps=0), ValueError, "eps: got 0"),
        (
            lambda: ff.add_rms_norm(X, X, X[0], eps=1, return_residual=None),
            TypeError,
            "return_residual: got NoneType",
        ),
        (lambda: ff.linear_cross_entropy(X, W, torch.zeros(3)), TypeError, "target: got dtype"),
        (
            lambda: ff.linear_cross_entropy(X, W, torch.tensor([0, 6, 1])),
            ValueError,
            "target: got classes from 0 to 6",
        ),
        (
            lambda: ff.linear_cross_entropy(X, W, torch.tensor([0, 1, 1]), reduction="max"),
            ValueError,
            "reduction: got 'max'",
        ),
        *(
            (
                lambda z=z: ff.linear_cross_entropy(X, W, torch.tensor([0, 1, 1]), z_loss=z),
                ValueError,
                f"z_loss: got {z}",
            )
            for z in (-0.1, float("inf"), float("nan"))
        ),
        (
            lambda: ff.rotary(X[None, None], X[None, None], X[:, :5], X[:, :5]),
            ValueError,
            r"cos: got shape \(3, 5\)",
        ),
        *(
            (lambda q=q, k=k: ff.rotary(q, k, X[:, :4], X[:, :4], inplace=True), error, message)
            for q, k, error, message in (
                (leaf(1, 2, 3, 8), HEADS, ValueError, "q: got a tensor that requires a gradient"),
                (HEADS, leaf(1, 2, 3, 8) * 2, ValueError, "k: got a tensor that requires"),
                (HEADS, HEADS[:, :1].expand(1, 2, 3, 8), ValueError, "k: got strides"),
                (torch.zeros(1, 2, 8, 3).mT, HEADS, ValueError, "q: got strides"),
                (HEADS, HEADS, ValueError, "k: got the same tensor as q"),
            )
        ),
        (
            lambda: ff.rotary(HEADS, HEADS, X[:, :4], X[:, :4], interleaved="yes"),
            TypeError,
            "interleaved: got str",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
