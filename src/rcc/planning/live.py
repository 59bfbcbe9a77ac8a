"""The bytes of tensors that exist while a model without storage runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class LiveBytes(FakeTensorMode):
    """Count the bytes of tensors that exist, now and at most, while a model without storage runs.

    Fake tensors are on the CPU by their own account, so autocast and the attention without scores are chosen as they
    are in training, which on the meta device they are not.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.inside = False

    def adopt(self, model: nn.Module) -> None:
        """Replace a meta model's tensors by fake ones; they do not count."""
        made: dict[int, Any] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in made:
                        fake = FakeTensor(self, tensor.detach().to("meta"), torch.device("cpu"))
                        self.known.add(fake.untyped_storage()._cdata)
                        learns = isinstance(tensor, nn.Parameter)
                        # the tensor too: another one must not get its id
                        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if learns else fake, tensor
                    if tensor is not None:
                        tensors[name] = made[id(tensor)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside, self.inside = self.inside, True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.inside = inside
        # what an operator is made of, which fake tensors go through at its first use, is not what its kernel allocates
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in () if inside else outputs:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size
