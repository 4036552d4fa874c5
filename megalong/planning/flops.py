"""The floating-point operations that a run executes, by part and direction.

Unlike `megalong.model.flops`, which knows what a model has to compute, this counts what a run does
compute: what is computed again in the backward pass, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from megalong.torch_private import TorchDispatchMode, is_going_backward

# (name of an operator, shapes of the tensors that it is given) -> what it is a part of
PartOf = Callable[[str, Sequence[tuple[int, ...]]], str]


class ExecutedFlops(TorchDispatchMode):
    """Counts matrix products and attention by the formulas of PyTorch's FlopCounterMode, with which
    our operators have registered theirs.

    counts: FLOPs by (what `part_of` says, "forward" or "backward").
    """

    def __init__(self, part_of: PartOf):
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._part_of = part_of
        self._formulas = FlopCounterMode(display=False).flop_registry

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        formula = self._formulas.get(operator.overloadpacket)
        if formula is not None:
            name = f"{operator.namespace}.{operator.overloadpacket.__name__}"
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            direction = "backward" if is_going_backward() else "forward"
            flops = formula(*args, **kwargs, out_val=result)
            self.counts[self._part_of(name, shapes), direction] += flops
        return result
