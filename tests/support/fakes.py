"""Holds the results of ops against what their fakes promise."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class FakesAgree(TorchDispatchMode):
    """Holds every call of an op of the package against its fake: sizes, strides and dtypes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        if op.namespace == "fuseformer":
            with FakeTensorMode() as mode:
                fake_args, fake_kwargs = tree_map_only(
                    torch.Tensor, mode.from_tensor, (args, kwargs)
                )
                promised = op(*fake_args, **fake_kwargs)
            pairs = zip(self._tensors(results), self._tensors(promised), strict=True)
            for place, (got, want) in enumerate(pairs):
                described = [(tuple(x.shape), x.stride(), x.dtype) for x in (got, want)]
                if got.numel():
                    assert described[0] == described[1], f"{op}, result {place}"
            self.seen.append(op._schema.name)
        return results

    @staticmethod
    def _tensors(results):
        return results if isinstance(results, (tuple, list)) else (results,)
