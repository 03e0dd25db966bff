"""Two GPUs that are none: tensors on the CPU which say `meta:0` or `meta:1` and insist on it.

An operation on tensors of two devices fails as it would on two real GPUs, where copies cross and
indices from the CPU suit all; its numbers are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rome.models import EditableModel, costs

aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    # Lengths are the CPU's.
    aten._pack_padded_sequence.default,
    aten._pack_padded_sequence_backward.default,
}


Watcher = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_watchers: list[Watcher] = []


class Placed(Tensor):
    """A tensor on the CPU that is said to be elsewhere."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            inner.stride(),
            inner.storage_offset(),
            None,
            inner.dtype,
            device=device,
        )
        made.numbers = inner
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _TwoGpus(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Without autograd, what is made of other operations comes as one.
        with self:
            made = func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}) if made is NotImplemented else made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    for watch in _watchers:
        watch(func, args, kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    checked = [x for x in tensors if isinstance(x, Placed) or func not in INDEXED]
    # A number suits every device.
    devices = {x.device for x in checked if x.dim() > 0 or isinstance(x, Placed)}
    if func not in COPIES and len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, devices))}")
    device = kwargs.get("device")
    if device is None:
        device = args[0].device if func in COPIES else next(iter(devices), None)
    else:
        kwargs = kwargs | {"device": "cpu"}
    outer = {id(x.numbers): x for x in tensors if isinstance(x, Placed)}
    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, Placed) else x, (args, kwargs))
    place = torch.device("cpu" if device is None else device)

    def placed(x: Any) -> Any:
        if id(x) in outer or not isinstance(x, Tensor) or place.type == "cpu":
            return outer.get(id(x), x)
        return Placed(x, place)

    made = func(*args, **kwargs)
    if func is aten._pack_padded_sequence.default:
        return placed(made[0]), made[1]
    return tree_map(placed, made)


def costs_like(known: str, device: str) -> AbstractContextManager[Any]:
    """In the block, what pays on one type of device pays on another."""
    return mock.patch.dict(costs.COSTS, {device: costs.COSTS[known]})


@contextmanager
def two_gpus(costs_of: Literal["cpu", "cuda"] = "cpu") -> Iterator[None]:
    """Devices `meta:0` and `meta:1`: autograd asks for no driver of this type.

    `costs_of`: batches are made as for this device.
    """
    with ExitStack() as stack, _TwoGpus():
        stack.enter_context(costs_like(costs_of, "meta"))
        stack.enter_context(mock.patch.object(adam, "_device_dtype_check_for_fused"))
        # `torch.tensor(data, device=...)` then makes its tensor by operations that are seen here.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within `two_gpus`: `watcher` is called with each operator before it runs."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def place(model: EditableModel) -> EditableModel:
    """Within `two_gpus`: the whole model on `meta:0`."""
    hf: Any = model.hf
    for module in hf.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.to("meta:0"), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta:0")
    return model


def spread(model: EditableModel, whole: bool = False) -> EditableModel:
    """Layers 0 and 1 on `meta:0`, the last one and the head on `meta:1`; `whole`: it alone."""
    import accelerate  # What counts operators on one device can do without it.

    base, layers = model.family.base, model.family.layers
    names = [name for name, _ in model.base.named_children()]
    first = names[: names.index(layers)]
    places = {
        f"{base}.{name}": f"meta:{int(name not in first)}" for name in names if name != layers
    }
    places |= {f"{base}.{layers}.{n}": f"meta:{n // 2}" for n in range(3)}
    if whole:
        places = {base: "meta:0"}
    (head,) = (name for name, _ in model.hf.named_children() if name != base)
    accelerate.dispatch_model(
        model.hf,
        places | {head: "meta:1"},
        main_device="meta:0",
        skip_keys=model.hf._skip_keys_device_placement,
    )
    return model
