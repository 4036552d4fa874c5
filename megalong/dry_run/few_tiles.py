"""Of the tiles of a sequence, three: the first, one that stands for those between, and the last.

All tiles between the first and the last have the same shapes, so what one of them computes, sends
and leaves behind is what each of them does. A million tokens have hundreds; the loops over them
(`megalong.model.chunked.rows.tiles`) are most of what a dry run has to do.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

from megalong.dry_run.memory import DeviceMemory
from megalong.dry_run.recorder import WorkRecorder
from megalong.model.chunked import rows


@contextlib.contextmanager
def few_tiles(memory: DeviceMemory, recorder: WorkRecorder) -> Iterator[None]:
    """Inside, every loop over more than three tiles has three, and what memory and recorder see of
    the middle one counts as often as there are tiles between the first and the last."""

    def few(count: int, size: int) -> Iterator[slice]:
        every = list(rows.tiles(count, size))
        if len(every) <= 3:
            yield from every
            return
        yield every[0]
        between, start = len(every) - 2, memory.moment
        with recorder.repeating(between):
            yield every[1]
        stop = memory.moment
        yield every[-1]
        # Only now nothing of the middle tile is held but what the loop keeps of every tile.
        memory.repeat(start, stop, between)

    loaded = [module for name, module in sys.modules.items() if name.startswith("megalong.")]
    with contextlib.ExitStack() as stack:
        for module in loaded:
            if module is not rows and getattr(module, "tiles", None) is rows.tiles:
                stack.enter_context(mock.patch.object(module, "tiles", few))
        yield
