"""Where a head comes from: a directory, a single file, a Hugging Face repo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.drafters.tensors import read_json
from redrafter_mlx.errors import UserError

from .kinds import beside, kind_of
from .pickles import read_pickle
from .safetensors import Tensor, read_safetensors

PICKLES = (".bin", ".pt", ".pth")
INDEX = "model.safetensors.index.json"
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
HUB_PICKLES = ["config.json", "pytorch_model*", "model.pt", "drafter.pt", "medusa_lm_head.pt"]
ACCEPTED = "a directory, a .safetensors, .bin or .pt file, or a Hugging Face repo as org/name"
CHOICES = (
    (INDEX, "index"),
    ("model*.safetensors", "weights"),
    ("rank*.safetensors", "ranks"),
    ("*.safetensors", "weights"),
    ("pytorch_model.bin.index.json", "index"),
    ("pytorch_model*.bin", "weights"),
    ("model.pt", "weights"),
    ("drafter.pt", "weights"),
    ("*.pth", "weights"),
    ("*.pt", "weights"),
)
"""Files of weights in the order in which they are looked for."""

NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are still in their files.

    name      as the user gave it
    path      the directory, or the file
    settings  config.json, {} if there is none
    files     everything that was read, for its hash
    """

    name: str
    path: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    files: list[Path] = field(default_factory=list)

    @property
    def config_path(self) -> Path:
        return (self.path if self.path.is_dir() else self.path.parent) / "config.json"


def open_source(name: str, revision: str | None = None, wanted: str | None = None) -> Source:
    """The checkpoint `name`; its tensors are not read yet.

    wanted  what --from says

    Of a head that lies among its target's tensors, only the files that hold it are opened.

    Raises UserError: nothing there, a damaged file, a link that leads elsewhere.
    """
    path = locate(name, revision, wanted)
    directory = path.parent if path.is_file() else path
    settings = _settings_in(directory)
    if path.is_file():
        files, tensors = [path], read_file(path)
    else:
        files, tensors = _read_directory(path, settings, wanted)
    used = [directory / "config.json"] if settings else []
    return Source(name, path, settings, tensors, [*files, *used])


def locate(name: str, revision: str | None = None, wanted: str | None = None) -> Path:
    """The local path of `name`; of a repo, what holds the head is downloaded first."""
    from redrafter_mlx.loading import places

    path = places.expanded(name)
    if path.exists() and name:
        if revision is not None:
            raise UserError(f"--revision {revision} is for Hugging Face repos; {name} is a path")
        return path
    if not places.is_repo_id(name):
        raise UserError(f"--input {name!r} does not exist; give {ACCEPTED}")
    listed = places.snapshot(name, revision, ["config.json", INDEX], ACCEPTED)
    if (listed / INDEX).is_file():
        held = _held(listed, _settings_in(listed), _inside(listed, listed / INDEX), wanted)
        files = ["config.json", INDEX, *sorted(set(held.values()))]
        return places.snapshot(name, revision, files, ACCEPTED)
    found = places.snapshot(name, revision, HUB_FILES, ACCEPTED)
    if any(found.glob("*.safetensors")):
        return found
    return places.snapshot(name, revision, HUB_PICKLES, ACCEPTED)


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file of weights."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in PICKLES:
        return read_pickle(file)
    raise UserError(f"{file}: is not a file of weights; give {ACCEPTED}")


def _settings_in(path: Path) -> dict[str, Any]:
    """config.json of a directory, {} if there is none."""
    config = path / "config.json"
    return _settings(_inside(path, config)) if config.exists() or config.is_symlink() else {}


def _settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds {json.dumps(settings)[:40]}, not a JSON object")
    return settings


def _read_directory(
    path: Path, settings: dict[str, Any], wanted: str | None
) -> tuple[list[Path], dict[str, Tensor]]:
    for pattern, kind in CHOICES:
        found = [p for p in sorted(path.glob(pattern)) if not p.name.startswith(NOT_WEIGHTS)]
        if not found:
            continue
        if kind == "index":
            index = _inside(path, found[0])
            return _read_index(path, index, _held(path, settings, index, wanted))
        if len(found) > 1 and pattern.startswith("*"):
            names = ", ".join(p.name for p in found)
            raise UserError(f"{path}: holds several heads; give one as --input: {names}")
        found = [_inside(path, file) for file in found]
        return found, _joined(path, found) if kind == "ranks" else _united(found)
    raise UserError(f"{path}: holds no weights (*.safetensors, pytorch_model*.bin, model.pt)")


def _held(path: Path, settings: dict[str, Any], index: Path, wanted: str | None) -> dict[str, str]:
    """The tensors that an index lists and their files, less those that are the target's."""
    places = _settings(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise UserError(f"{index}: has no weight_map of tensor names to files")
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index}: names the file {name!r}, which is not beside it")
    kind = kind_of(path, settings, places, wanted)
    left_out = beside(kind, places) if kind else set()
    return {name: place for name, place in places.items() if name not in left_out}


def _read_index(
    path: Path, index: Path, places: dict[str, str]
) -> tuple[list[Path], dict[str, Tensor]]:
    """What an index lists: `places` of tensors, as of `_held`."""
    files = []
    for name in sorted(set(places.values())):
        if not (path / name).exists():
            raise UserError(f"{index}: names {name}, which is missing; get the head again")
        files.append(_inside(path, path / name))
    tensors = _united(files)
    for name, place in places.items():
        if name not in tensors or tensors[name].file.name != place:
            raise UserError(f"{index}: says that {place} holds {name}, which it does not")
    if unlisted := sorted(tensors.keys() - _settings(index)["weight_map"].keys()):
        raise UserError(f"{index}: does not list {', '.join(unlisted)}, which its files hold")
    return [index, *files], tensors


def _united(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_file(file)
        if twice := sorted(found.keys() & tensors.keys()):
            other = tensors[twice[0]].file.name
            raise UserError(f"{file}: holds {', '.join(twice)} again; {other} has it already")
        tensors.update(found)
    return tensors


def _joined(path: Path, files: list[Path]) -> dict[str, Tensor]:
    """Tensors that TensorRT-LLM has split over GPUs; a drafter's always along the first axis."""
    names = [f"rank{number}.safetensors" for number in range(len(files))]
    parts = [read_file(path / name) for name in names if (path / name) in files]
    if len(parts) < len(files) or any(part.keys() != parts[0].keys() for part in parts):
        raise UserError(f"{path}: its files are not the parts of one head: rank0 to rankN are")
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(parts: list[Tensor]) -> Tensor:
    """The parts below one another; the first one alone if they are not rows of one matrix."""
    first = parts[0]
    if len(parts) == 1 or any(
        not part.shape or part.shape[1:] != first.shape[1:] or part.dtype != first.dtype
        for part in parts
    ):
        return first
    ends = list(accumulate(part.shape[0] for part in parts))

    def rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        for part, end in zip(parts, ends, strict=True):
            begin = end - part.shape[0]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                pieces.append(part.rows(low - begin, high - begin))
        return np.concatenate(pieces)

    return replace(first, shape=(ends[-1], *first.shape[1:]), rows=rows)


def _inside(directory: Path, file: Path) -> Path:
    """`file`, unless it is a link that leads out of the directory.

    The Hugging Face cache keeps a repo's files as links into its `blobs`; those are allowed.
    """
    target = file.resolve()
    if any(target.is_relative_to(place) for place in _allowed(directory.resolve())):
        return file
    raise UserError(f"{file}: is a link to {target}, outside {directory}; copy the file there")


def _allowed(directory: Path) -> Iterator[Path]:
    yield directory
    repo = directory.parent.parent
    blobs = (repo / "blobs").resolve()
    if directory.parent.name == "snapshots" and blobs.parent == repo:
        yield blobs
