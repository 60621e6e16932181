"""What happens to weights on the way: rows chosen, types cast, layers packed and unpacked.

Everything works on blocks of rows, so that a head of any size needs only a little memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device

from .head import Head, Packing
from .safetensors import Entry, Tensor

BLOCK_BYTES = 16 * 2**20
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
WORDS = {code: word for word, code in DTYPES.items()}


@dataclass(frozen=True)
class Recipe:
    """What to make of a head.

    dtype    safetensors' name of the type of all weights that are not packed; None: as it was
    packing  how to quantise; None: do not
    unpack   turn packed layers into plain ones
    kept     rows of the output layer to keep, in ascending order of the target's ids; None: all
    """

    dtype: str | None = None
    packing: Packing | None = None
    unpack: bool = False
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class Job:
    """One module's parameter on its way: from tensors of the source to entries of the output.

    packing  to quantise with; `unpack`, to unpack with
    rows     to take; None: all
    """

    sources: tuple[Tensor, ...]
    entries: tuple[Entry, ...]
    packing: Packing | None = None
    unpack: Packing | None = None
    rows: np.ndarray | None = None

    def blocks(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Arrays for each entry, block by block of rows.

        Raises UserError for a value that is not finite, or too large for the type asked for.
        """
        width = max(math.prod(tensor.shape[1:]) for tensor in self.sources)
        if self.unpack:
            width = width * 32 // self.unpack.bits
        step = max(1, BLOCK_BYTES // (4 * width))
        count = self.entries[0].shape[0]
        for start in range(0, count, step):
            yield self._block(start, min(count, start + step))

    def _block(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        pieces = [_take(tensor, start, stop, self.rows) for tensor in self.sources]
        arrays = [as_mlx(*each) for each in zip(pieces, self.sources, strict=True)]
        for array, tensor in zip(arrays, self.sources, strict=True):
            self._check_finite(array, tensor, "NaN or infinite values; get the head again")
        if self.unpack:
            wide = [array.astype(mx.float32) for array in arrays[1:]]
            arrays = [mx.dequantize(arrays[0], *wide, self.unpack.group_size, self.unpack.bits)]
        for i, entry in enumerate(self.entries if not self.packing else self.entries[1:2]):
            wanted = _MLX[entry.dtype]
            if arrays[i].dtype != wanted:
                arrays[i] = arrays[i].astype(wanted)
                fault = f"values too large for {WORDS[entry.dtype]}; use --dtype bfloat16"
                self._check_finite(arrays[i], self.sources[i], fault)
        if self.packing:
            arrays = mx.quantize(arrays[0], self.packing.group_size, self.packing.bits)
        return tuple(as_numpy(array) for array in arrays)

    def _check_finite(self, array: mx.array, tensor: Tensor, fault: str) -> None:
        if array.dtype == mx.uint32:
            return
        (fine,) = device.read(mx.isfinite(array).all())
        if not fine:
            raise UserError(f"{tensor.file}: {tensor.name} holds {fault}")


def as_mlx(array: np.ndarray, tensor: Tensor) -> mx.array:
    """Rows of a tensor as mlx has them."""
    found = mx.array(array)
    return found.view(mx.bfloat16) if tensor.dtype == "BF16" else found


def as_numpy(array: mx.array) -> np.ndarray:
    """An array for writing; bfloat16 as its bits."""
    (found,) = device.read(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return found


def _take(tensor: Tensor, start: int, stop: int, rows: np.ndarray | None) -> np.ndarray:
    """Rows start to stop of the tensor, or of its `rows`."""
    if rows is None:
        return tensor.rows(start, stop)
    wanted = rows[start:stop]
    ends = np.flatnonzero(np.diff(wanted) != 1) + 1
    runs = np.split(wanted, ends)
    return np.concatenate([tensor.rows(int(run[0]), int(run[-1]) + 1) for run in runs])


def jobs(head: Head, recipe: Recipe) -> list[Job]:
    """What has to be done for each parameter of the head, by our names."""
    found = []
    for name, tensor in head.tensors.items():
        module, _, parameter = name.rpartition(".")
        rows = recipe.kept if module in (head.outputs or ()) else None
        if parameter in ("scales", "biases"):
            continue
        if f"{module}.scales" in head.tensors and parameter == "weight":
            found.append(_packed_job(head, recipe, module, rows))
        else:
            packing = recipe.packing if head.may_be_packed(name) else None
            found.append(_plain_job(recipe.dtype, packing, name, tensor, rows))
    return found


def _plain_job(
    dtype: str | None, packing: Packing | None, name: str, tensor: Tensor, rows: np.ndarray | None
) -> Job:
    shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
    dtype = dtype or tensor.dtype
    if not (packing and fits(shape, packing)):
        return Job((tensor,), (Entry(name, dtype, shape),), rows=rows)
    module, (count, columns) = name.removesuffix(".weight"), shape
    groups = (count, columns // packing.group_size)
    entries = (
        Entry(name, "U32", (count, columns * packing.bits // 32)),
        Entry(f"{module}.scales", dtype, groups),
        Entry(f"{module}.biases", dtype, groups),
    )
    return Job((tensor,), entries, packing=packing, rows=rows)


def _packed_job(head: Head, recipe: Recipe, module: str, rows: np.ndarray | None) -> Job:
    names = [f"{module}.{parameter}" for parameter in ("weight", "scales", "biases")]
    sources = tuple(head.tensors[name] for name in names)
    count = sources[0].shape[0] if rows is None else len(rows)
    dtype = recipe.dtype or sources[1].dtype
    if recipe.unpack:
        shape = (count, sources[1].shape[1] * head.packing.group_size)
        return Job(sources, (Entry(names[0], dtype, shape),), unpack=head.packing, rows=rows)
    entries = [
        Entry(name, "U32" if tensor.dtype == "U32" else dtype, (count, *tensor.shape[1:]))
        for name, tensor in zip(names, sources, strict=True)
    ]
    return Job(sources, tuple(entries), rows=rows)


def fits(shape: tuple[int, ...], packing: Packing) -> bool:
    """Whether a matrix divides into groups."""
    return len(shape) == 2 and shape[1] % packing.group_size == 0
