"""One model on several machines: the first process leads, the others follow.

mlx.launch starts the processes, mlx-lm splits each layer over them (tensor parallelism). Only the
leader drafts, prices and judges. Before each forward pass it says in a message of a few hundred
bytes which rows are read and what was kept of the pass before; the others do the same with their
parts of the layers and caches, and know no more of the text. So trees cannot differ between
processes, whatever clocks and profiles say, and nothing but the model's own reductions and these
messages crosses the network.
"""

from __future__ import annotations

import atexit
import json
import weakref
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.machine import device
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.cache import Branches, Quantization
from redrafter_mlx.target.caches import LayerCaches

if TYPE_CHECKING:
    from redrafter_mlx.target.adapter import Target


@cache
def group() -> Any:
    """All processes that were started together; this one alone without mlx.launch."""
    return mx.distributed.init()


def is_follower() -> bool:
    return group().rank() > 0


@cache
def leader() -> Leader | None:
    """The leader, in its own process; None in followers, and where there are none."""
    return Leader() if group().size() > 1 and not is_follower() else None


def _share(x: mx.array) -> mx.array:
    """The leader's array (any shape, int32), in every process."""
    return mx.distributed.all_sum(x, group=group())


class Leader:
    """Tells the other processes what to do; news is sent with the next forward pass."""

    def __init__(self):
        self._news: list[list] = []
        self._caches = 0
        self._last: mx.array | None = None
        atexit.register(self.end)

    def tell(self, *what: Any) -> None:
        """Add news that has to be known before the next pass."""
        self._news.append(list(what))

    def new_caches(self, quantization: Quantization | None, steps_back: int) -> int:
        """The number of new caches for a text, which the others make too."""
        self._caches += 1
        how = quantization and [quantization.bits, quantization.group_size, quantization.start]
        self.tell("new", self._caches, how, steps_back)
        return self._caches

    def forward(self, number: int, ids: mx.array) -> mx.array:
        """The token ids (B, N) of a pass that the others run too."""
        self.tell("forward", number, list(ids.shape))
        self._send()
        return _share(ids.astype(mx.int32))

    def ran(self, hidden: mx.array) -> None:
        """Note the pass's output, which is not computed yet."""
        self._last = hidden

    def end(self) -> None:
        """No more passes: the others end. If one has gone, waiting for it would never end."""
        if not device.has_failed:
            self.tell("end")
            self._send()

    def _send(self) -> None:
        content = np.frombuffer(json.dumps(self._news).encode(), np.uint8).astype(np.int32)
        self._news = []
        if self._last is not None:
            device.finish(self._last)  # its reductions come before those of the message
        device.finish(_share(mx.array([len(content)], mx.int32)))
        device.finish(_share(mx.array(content)))


def _receive() -> list[list]:
    (length,) = device.read(_share(mx.zeros(1, mx.int32)))
    (content,) = device.read(_share(mx.zeros(int(length[0]), mx.int32)))
    return json.loads(content.astype(np.uint8).tobytes())


class LedCaches(LayerCaches):
    """The leader's caches: what is done to them is told to the others."""

    def __init__(self, layers: Sequence[Any], quantization: Quantization | None, steps_back: int):
        super().__init__(layers, quantization)
        self.number = leader().new_caches(quantization, steps_back)
        weakref.finalize(self, leader().tell, "free", self.number)

    def begin(self, rows: int, branches: Branches | None = None, certain: bool = False) -> None:
        super().begin(rows, branches, certain)
        parents = None if branches is None else branches.lineage.parents.tolist()
        leader().tell("begin", self.number, rows, parents, certain)

    def commit(self, path: Sequence[int]) -> None:
        super().commit(path)
        leader().tell("commit", self.number, [int(row) for row in path])

    def rewind(self, length: int) -> bool:
        leader().tell("rewind", self.number, length)
        return super().rewind(length)


def follow(target: Target) -> None:
    """Run the leader's passes with this process's part of the model, until it ends."""
    texts: dict[int, LayerCaches] = {}
    while True:
        for what, *news in _receive():
            if what == "end":
                return
            number, *more = news
            if what == "new":
                how, steps_back = more
                texts[number] = target.empty_caches(how and Quantization(*how), steps_back)
            elif what == "free":
                texts.pop(number, None)
            elif what == "begin":
                rows, parents, certain = more
                texts[number].begin(rows, _branches(parents, texts[number].length), certain)
            elif what == "commit":
                texts[number].commit(more[0])
            elif what == "rewind":
                texts[number].rewind(more[0])
            elif what == "forward":
                ids = _share(mx.zeros(more[0], mx.int32))
                device.finish(target.forward(ids, texts[number]).hidden)


def _branches(parents: list[int] | None, length: int) -> Branches | None:
    if parents is None:
        return None
    nothing = np.zeros(len(parents), np.int32)
    return Branches(TokenTree(nothing, np.array(parents, np.int32), nothing), length)
