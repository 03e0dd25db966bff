"""tf32 without a card: products of float32 whose factors are rounded to ten bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operator -> the places of its two factors.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.addmv.default: (1, 2),
}
_LOST = 13  # Of the 23 bits of a float32's mantissa.


class Tf32(TorchDispatchMode):
    """Within the block, products round as a card's do where `use_precision` has set `tf32`.

    Sums stay in float32, as there. All linear maps, both ways, and attention by matmuls are such
    products; the fused attention of whole prompts is not, and stays in float32.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _PRODUCTS:
            # In inference mode torch shows maps whole, and their products only when asked for them.
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        given = list(args)
        for place in _PRODUCTS.get(func, ()):
            if given[place].dtype == torch.float32:
                given[place] = rounded(given[place])
        return func(*given, **(kwargs or {}))


def rounded(values: Tensor) -> Tensor:
    """float32 to the nearest number with ten bits of mantissa, halves away from zero."""
    bits = values.view(torch.int32) + (1 << (_LOST - 1))
    return (bits & -(1 << _LOST)).view(torch.float32)
