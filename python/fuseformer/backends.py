"""Which implementation serves a call, why, and what served the last ones."""

import importlib.util
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from .cuda import attention as cuda_attention
from .cuda import decode as cuda_decode
from .cuda import feed_forward as cuda_feed_forward
from .cuda import library
from .preferences import why_triton_first

BACKENDS = ("cuda", "triton", "cpu", "reference")
_TRITON_OPS = (
    "attention",
    "varlen_attention",
    "decode_attention",
    "feed_forward",
    "gated_feed_forward",
    "add_layer_norm",
    "add_rms_norm",
    "linear_cross_entropy",
    "rotary",
)
# With the options that each takes; dropout, causal masks and lengths are not named.
_CUDA_OPS = {
    "attention": cuda_attention.OPTIONS,
    "varlen_attention": cuda_attention.OPTIONS,
    "decode_attention": cuda_decode.OPTIONS,
    "feed_forward": frozenset(),
    "gated_feed_forward": frozenset(),
}
# A row of the Triton norms stays in the registers of one program.
_MAX_NORM_WIDTH = 8192
# The first with bfloat16 and asynchronous copies, and the oldest that kernels are compiled for.
_LEAST_CAPABILITY = 80
_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)

#: Device types on which Triton kernels can be launched. A test adds "cpu" while something executes
#: them there; Triton's own interpreter does when TRITON_INTERPRET=1 was set before its import.
TRITON_DEVICES = {"cuda"} | ({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else set())

#: Device types on which the CUDA C++ kernels can be launched; a test adds "cpu" while the emulator
#: executes them there.
CUDA_DEVICES = {"cuda"}

_override: str | None = None
_TRANSFORMED = "transform"


@dataclass(frozen=True)
class Request:
    """What `choose_backend` decides on: an op, where and in what dtype it runs, who asks.

    `shapes` are the sizes of the op's leading tensors, `options` the names of the optional features
    in use, `head_dim` is 0 for ops without heads, `requested` a backend's name or None.
    `capability` is that of the GPU, 80 for sm_80, and 0 where there is none. `trains` is whether a
    backward pass will follow, `activation` the name of a feed-forward block's.
    """

    op: str
    device: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...] = ()
    options: frozenset[str] = frozenset()
    head_dim: int = 0
    requested: str | None = None
    capability: int = 0
    trains: bool = False
    activation: str | None = None


def device_capability(index: int | None) -> int:
    """Return the compute capability of a GPU, 80 for sm_80, and 0 where there is none.

    Without an index it is that of the current one. Compiled graphs take it for a constant.
    """
    if not torch.cuda.is_available():
        return 0  # a fake tensor may be on a GPU that is not there
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


# What `torch.compiler.assume_constant_result` sets: it would import the compiler with the package.
device_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether the triton package is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def refusal(backend: str, request: Request) -> str | None:
    """Return why `backend` cannot serve `request`, as a sentence, or None where it can."""
    if _TRANSFORMED in request.options and backend != "reference":
        return "torch.func and forward-mode AD need plain PyTorch, which they can take apart"
    if backend == "cuda":
        return _cuda_refusal(request)
    if backend == "reference":
        return None
    if backend == "cpu":
        if request.device != "cpu":
            return f"the tensors are on {request.device}, not on the cpu"
        return None
    if not has_triton():
        return "the triton package is not installed"
    if request.device not in TRITON_DEVICES:
        return f"Triton kernels do not run on {request.device} tensors"
    if 0 < request.capability < _LEAST_CAPABILITY:
        return (
            f"the Triton kernels need a GPU of sm_{_LEAST_CAPABILITY} or newer, this one is "
            f"sm_{request.capability}"
        )
    if request.op not in _TRITON_OPS:
        return f"there is no Triton kernel for {request.op} yet"
    if request.dtype not in _HALF_AND_SINGLE:
        return f"the Triton kernels take float32, float16 and bfloat16, not {request.dtype}"
    if request.op in ("add_layer_norm", "add_rms_norm"):
        width = request.shapes[0][-1] if request.shapes else 0
        if width > _MAX_NORM_WIDTH:
            return f"the Triton norms take rows of at most {_MAX_NORM_WIDTH} values, not {width}"
    if request.head_dim and not 8 <= request.head_dim <= 256:
        return f"the Triton kernels take head dims from 8 to 256, not {request.head_dim}"
    return None


def _cuda_refusal(request: Request) -> str | None:
    """Return why the CUDA C++ kernels cannot serve `request`, or None."""
    if request.device not in CUDA_DEVICES:
        return f"the CUDA C++ kernels do not run on {request.device} tensors"
    if request.op not in _CUDA_OPS:
        return f"there is no CUDA C++ kernel for {request.op} yet"
    if request.dtype not in cuda_attention.DTYPES:
        return f"the CUDA C++ kernels take float16 and bfloat16, not {request.dtype}"
    if request.op in ("feed_forward", "gated_feed_forward"):
        sizes = (request.shapes[0][-1], request.shapes[1][0]) if request.shapes else ()
        if any(size % cuda_feed_forward.MULTIPLE for size in sizes):
            return (
                f"the CUDA C++ kernels take widths that are multiples of "
                f"{cuda_feed_forward.MULTIPLE}, not {' and '.join(map(str, sizes))}"
            )
    elif request.head_dim not in cuda_attention.HEAD_DIMS:
        dims = ", ".join(map(str, cuda_attention.HEAD_DIMS))
        return f"the CUDA C++ kernels take head dims {dims}, not {request.head_dim}"
    unsupported = request.options - _CUDA_OPS[request.op]
    if unsupported:
        return f"the CUDA C++ kernels do not take {', '.join(sorted(unsupported))}"
    if "block_table" in request.options and request.shapes:
        queries, most = request.shapes[0][2], cuda_decode.MOST_QUERIES
        if queries > most:
            return f"the CUDA C++ kernels take at most {most} new tokens over pages, not {queries}"
    if request.device == "cpu":
        return None  # the emulator
    if request.capability < _LEAST_CAPABILITY:
        return (
            f"the CUDA C++ kernels need a GPU of sm_{_LEAST_CAPABILITY} or newer, this one is "
            f"sm_{request.capability}"
        )
    return library.refusal(request.capability)


def choose_backend(request: Request) -> tuple[str, str]:
    """Return the backend that serves `request` and the reason, as a sentence.

    A pure function of the request, given what is installed. Raises `ValueError` where a backend
    asked for by name cannot serve, or has no such name: it never falls back in silence.
    """
    if request.requested is not None:
        if request.requested not in BACKENDS:
            raise ValueError(
                f"backend: got {request.requested!r}, expected one of {', '.join(BACKENDS)} or None"
            )
        reason = refusal(request.requested, request)
        if reason is not None:
            raise ValueError(
                f"backend: {request.requested!r} cannot serve {request.op}: {reason}; pass "
                "backend=None to let fuseformer choose"
            )
        return request.requested, "asked for by name"
    if request.device == "cpu":
        reason = refusal("cpu", request)
        if reason is None:
            return "cpu", "the tensors are on the cpu"
        return "reference", f"plain PyTorch, because {reason}"
    cuda, triton = refusal("cuda", request), refusal("triton", request)
    gpu = f"sm_{request.capability}"
    why = why_triton_first(request)
    if cuda is None and why is None:
        return "cuda", f"CUDA C++ goes before Triton on {gpu}"
    if triton is None:
        if cuda is not None:
            return "triton", f"fused Triton kernels serve this call on {request.device}"
        return "triton", f"Triton goes before CUDA C++ for this call on {gpu}: {why}"
    if cuda is None:
        return "cuda", f"the CUDA C++ kernels serve this call, because {triton}"
    return "reference", f"plain PyTorch, because {triton}"


def requested_backend(backend: str | None) -> str | None:
    """Return the backend asked for: the argument, else the one of `use_backend`, else None."""
    return _override if backend is None else backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op called inside by the backend `name`: "cuda", "triton", "cpu" or "reference".

    Process-wide, like `torch.backends` settings. Ops raise `ValueError` where that backend cannot
    serve them. Raises `ValueError` at once for an unknown name.
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


@dataclass
class Decision:
    """One call that was served: its request, its backend, and how often it came in a row."""

    request: Request
    backend: str
    calls: int = 1

    def reason(self) -> str:
        """Return why this backend served the call."""
        automatic, why = choose_backend(replace(self.request, requested=None))
        return why if automatic == self.backend else "asked for by name"

    def refusals(self) -> dict[str, str]:
        """Return, for each backend that could not have served the call, the reason."""
        reasons = {name: refusal(name, self.request) for name in BACKENDS}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) for shape in self.request.shapes)
        dtype = str(self.request.dtype).removeprefix("torch.")
        options = f" [{', '.join(sorted(self.request.options))}]" if self.request.options else ""
        times = f" ({self.calls} calls)" if self.calls > 1 else ""
        lines = [
            f"{self.request.op} {shapes} {dtype}{options}{times}: {self.backend}, {self.reason()}"
        ]
        lines += [f"    not {name}: {reason}" for name, reason in self.refusals().items()]
        return "\n".join(lines)


@dataclass
class Explanation:
    """The decisions of the last calls; as a context manager, of the calls made inside it."""

    decisions: list[Decision] = field(default_factory=list)

    def __enter__(self) -> "Explanation":
        self.decisions = []
        _listeners.append(self.decisions)
        return self

    def __exit__(self, *exception: object) -> None:
        for index, listener in enumerate(_listeners):
            if listener is self.decisions:
                del _listeners[index]
                break

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions)) or "no call of a fuseformer op yet"


_recent: deque[Decision] = deque(maxlen=32)
_listeners: list[list[Decision]] = []


def record(request: Request, backend: str) -> None:
    """Remember that `backend` served `request`, for `explain`; not while a graph is made.

    Comparing symbolic sizes would make constants of them.
    """
    if torch.compiler.is_compiling() or any(type(n) is not int for s in request.shapes for n in s):
        return
    for log in (_recent, *_listeners):
        if log and log[-1].backend == backend and log[-1].request == request:
            log[-1].calls += 1
        else:
            log.append(Decision(request, backend))


def explain() -> Explanation:
    """Return which backend served each of the last calls, and why the others did not.

    Print it, or use it as ``with fuseformer.explain() as decisions:`` to see only the calls made
    inside. At most the last 32 distinct decisions are kept.
    """
    return Explanation(list(_recent))


def _transformed() -> bool:
    """Return whether a function transform or forward-mode AD is at work on this thread."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def request_for(
    op: str,
    lead: Tensor,
    *others: Tensor,
    options: frozenset[str] = frozenset(),
    head_dim: int = 0,
    requested: str | None = None,
    dtype: torch.dtype | None = None,
    trained: tuple[Tensor, ...] = (),
    activation: str | None = None,
    trains: bool | None = None,
) -> Request:
    """Return the request of `op`; `lead` gives the device, and the dtype unless given.

    Its shapes are those of `lead` and `others`; `trained` are more inputs that have a gradient.
    `trains` is found out unless given: a custom op is called where nothing records gradients.
    """
    # Not as numbers: sizes of an exported graph are symbols, which would become constants.
    shapes = tuple(tuple(t.shape) for t in (lead, *others))
    if _transformed():
        options = options | {_TRANSFORMED}
    device = lead.device
    capability = device_capability(device.index) if device.type == "cuda" else 0
    if trains is None:
        inputs = (lead, *others, *trained)
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return Request(
        op,
        device.type,
        dtype or lead.dtype,
        shapes,
        options,
        head_dim,
        requested,
        capability,
        trains,
        activation,
    )
