"""Loads target models: from a directory, a GGUF file or Hugging Face, or the demo."""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_adapters, load_model, load_tokenizer

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.importer import LAYOUT_VERSION, import_gguf
from redrafter_mlx.loading.demo import DEMOS, demo_target
from redrafter_mlx.loading.places import TARGET_NAMES, expanded, local_directory, snapshot
from redrafter_mlx.loading.precision import compute_in_float32
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import build_once, cache_directory, conversions, one_line
from redrafter_mlx.target import parallel
from redrafter_mlx.target.adapter import adapt

DEMO = "demo"

logger = logging.getLogger("redrafter_mlx")


def load(
    path_or_hf_repo: str = DEMO,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple:
    """Load a target model and its tokenizer; `mlx_lm.load` with two more kinds of name.

    The name is tried as: the word `demo` (SmolLM2-135M-Instruct, downloaded once, 93 MB) or
    `gemma-demo` (Gemma 3 270M, 239 MB), a local directory, a local .gguf file (converted once), a
    Hugging Face repo `org/name`.
    On a CPU every model computes in float32, because 16-bit and quantised products use no BLAS
    there and accumulate in 16 bits; the weights are then read at once, even with `lazy`.

    Args:
        path_or_hf_repo: the name, see above. For a directory called `demo` give `./demo`.
        tokenizer_config, model_config, adapter_path, lazy, return_config, trust_remote_code:
            as in `mlx_lm.load`.
        revision: branch, tag or commit; Hugging Face repos only.

    Returns:
        (model, tokenizer) as `mlx_lm.load` returns them, plus the config with `return_config`.

    Raises:
        UserError: there is no such model, or it cannot be loaded; the message says why.
    """
    directory = resolve_target(path_or_hf_repo, revision)
    shared = parallel.group().size() > 1
    try:
        model, config = load_model(
            directory, lazy=True, model_config=model_config, trust_remote_code=trust_remote_code
        )
        if adapter_path is not None:
            model = load_adapters(model, adapter_path)
            model.eval()
        with ThreadPoolExecutor(1) as beside:  # takes as long as reading a small model's weights
            making = beside.submit(
                load_tokenizer, directory, tokenizer_config, config.get("eos_token_id")
            )
            if mx.default_device() == mx.cpu:
                compute_in_float32(model)
                config.pop("quantization", None)
            elif not (lazy or shared):
                device.finish(model.parameters())
            tokenizer = making.result()
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot load {path_or_hf_repo}: {one_line(error)}; "
            f"{_way_out(str(path_or_hf_repo), directory)}"
        ) from error
    if shared:
        _split(model, str(path_or_hf_repo))
    model._redrafter_name, model._redrafter_directory = str(path_or_hf_repo), directory
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def _split(model: nn.Module, name: str) -> None:
    """Keep this process's part of the model; a follower serves its leader here, then exits."""
    processes = parallel.group().size()
    try:
        model.shard(parallel.group())
        device.finish(model.parameters())
        target = adapt(model) if parallel.is_follower() else None
    except (AttributeError, ValueError, UserError) as error:
        raise UserError(
            f"{name} cannot be split over {processes} processes: {one_line(error)}; mlx-lm must "
            "support it, and the model's numbers of heads must be multiples of that of processes"
        ) from error
    if target is not None:
        parallel.follow(target)
        raise SystemExit(0)


def resolve_target(name_or_path: str, revision: str | None = None) -> Path:
    """The local directory of a target model, which is downloaded or converted first if need be.

    Args:
        name_or_path: as in `load`.
        revision: branch, tag or commit; Hugging Face repos only.

    Returns:
        The directory, which has a config.json; for a repo, the snapshot in the Hugging Face cache.

    Raises:
        UserError: no such model.
    """
    name = str(name_or_path)
    check_revision(name, revision)
    if name in DEMOS:
        directory = demo_target(name)
    elif _is_gguf(name):
        directory = _converted(expanded(name))
    else:
        directory = local_directory(name, TARGET_NAMES) or snapshot(
            name, revision, DEFAULT_ALLOW_PATTERNS, TARGET_NAMES
        )
    check_config(directory, _way_out(name, directory))
    return directory


def check_revision(name: str, revision: str | None) -> None:
    """Raise UserError for a revision of anything but a Hugging Face repo."""
    if revision is not None and (name in DEMOS or expanded(name).exists()):
        raise UserError(
            f"revision {revision!r} is for Hugging Face repos, and {name} is not one: leave it out"
        )


def _is_gguf(name: str) -> bool:
    return expanded(name).suffix == ".gguf" and expanded(name).is_file()


def _way_out(name: str, directory: Path) -> str:
    """What the user can do about a target's directory that cannot be loaded."""
    if name in DEMOS or _is_gguf(name):  # we wrote it, and it has been changed since
        return f"delete {directory}, and the next run makes it anew"
    return "give a complete model of a type that mlx-lm supports"


def check_config(directory: Path, way_out: str) -> None:
    """Raise UserError, which ends with `way_out`, if config.json is missing or broken."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"{directory} has no config.json, so it is not a model; {way_out}"
        raise UserError(message) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {one_line(error)}; {way_out}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(config).__name__}; {way_out}")


def _converted(source: Path) -> Path:
    """The cached conversion of a local GGUF file; a changed file is converted again."""
    source = source.resolve()
    stat = source.stat()
    identity = f"{source}\n{stat.st_size}\n{stat.st_mtime_ns}\n{LAYOUT_VERSION}"
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def build(destination: Path) -> None:
        logger.info("converting %s to %s", source, cache_directory())
        import_gguf(source, destination)

    return build_once(conversions() / name, build)
