"""What the rotary kernels must satisfy; each check raises `AssertionError` where one does not.

`kernels` is the kernel module, or a copy of it with a planted bug.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from block_checks import Results, judge
from torch import Tensor

from fuseformer import reference


@dataclass(frozen=True)
class RotaryCase:
    """A call: (batch, heads of q, heads of k, length, head dim), and how many pairs turn.

    `batched` tables differ by sequence. `layout` is how q and k lie in memory: "dense",
    "transposed" with heads beside positions, "packed" in one tensor like that, "last" with a last
    stride other than 1, "expanded" over the batch.
    """

    sizes: tuple[int, int, int, int, int]
    half: int
    dtype: torch.dtype
    interleaved: bool = False
    batched: bool = False
    layout: str = "dense"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = ["interleaved", "batched"]
        special = "".join(f"-{word}" for word in words if getattr(self, word))
        return f"{dtype}-{'x'.join(map(str, self.sizes))}-{self.half}-{self.layout}{special}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return q and k as the case lays them out."""
        generator = torch.Generator().manual_seed(0)
        batch, heads_q, heads_k, length, dim = self.sizes

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        if self.layout == "packed":
            # Beside a value head, and past a column that spoils the alignment of rows if odd.
            packed = draw(batch, length, heads_q + heads_k + 1, dim)
            q, k, _ = packed.split([heads_q, heads_k, 1], dim=2)
            return q.transpose(1, 2), k.transpose(1, 2)
        if self.layout == "transposed":
            q, k = (draw(batch, length, heads, dim) for heads in (heads_q, heads_k))
            return q.transpose(1, 2), k.transpose(1, 2)
        if self.layout == "last":
            q, k = (draw(batch, heads, dim, length) for heads in (heads_q, heads_k))
            return q.mT, k.mT
        if self.layout == "expanded":
            q, k = (draw(1, heads, length, dim) for heads in (heads_q, heads_k))
            return q.expand(batch, -1, -1, -1), k.expand(batch, -1, -1, -1)
        return draw(batch, heads_q, length, dim), draw(batch, heads_k, length, dim)


def check_rotary(kernels: ModuleType, case: RotaryCase) -> None:
    """Both directions against the oracle, repeated, and in place; the way back ends at the start.

    Rows behind the results must stay as they are: outputs are slices of larger tensors.
    """
    q, k = case.inputs()
    generator = torch.Generator().manual_seed(1)
    lead = (case.sizes[0],) if case.batched else ()
    angle = torch.rand(*lead, case.sizes[3], case.half, generator=generator) * 7
    cos, sin = angle.cos(), angle.sin()

    def run() -> Results:
        results = {}
        for name, inverse in (("turned", False), ("back", True)):
            wide = [torch.full((*x.shape[:3], x.shape[3] + 8), 7.0, dtype=x.dtype) for x in (q, k)]
            outs = [x[..., :-8] for x in wide]
            kernels.rotate(q, k, *outs, cos, sin, inverse, case.interleaved)
            assert all((x[..., -8:] == 7.0).all() for x in wide), "something past the heads"
            results |= {f"{name}_q": outs[0], f"{name}_k": outs[1]}
        return results

    def oracle(dtype: torch.dtype) -> Results:
        results = {}
        for name, inverse in (("turned", False), ("back", True)):
            for letter, x in (("q", q), ("k", k)):
                results[f"{name}_{letter}"] = reference.rotate(
                    x.to(dtype), cos, sin, inverse=inverse, interleaved=case.interleaved
                )
        return results

    judge(run, oracle, case.dtype)
    if case.layout not in ("last", "expanded"):
        turned = run()
        kernels.rotate(q, k, q, k, cos, sin, False, case.interleaved)
        assert torch.equal(q, turned["turned_q"]), "in place, q"
        assert torch.equal(k, turned["turned_k"]), "in place, k"
