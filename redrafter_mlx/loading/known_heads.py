"""Finds the draft head of a target: inside it, beside it, or in a Hugging Face repo."""

from __future__ import annotations

import importlib.resources
import json
import logging
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from redrafter_mlx.drafters.kinds import KINDS
from redrafter_mlx.drafters.published import shards_of
from redrafter_mlx.drafters.tensors import read_json, tensor_names
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import places

INDEX = "model.safetensors.index.json"
BESIDE = "drafter"
"""The directory of a model's own drafter, in the model's directory."""

_WITHOUT = re.compile(
    r"[-_.](mlx|hf|gguf|bf16|fp16|fp8|f16|dwq|qat|awq|gptq|optiq|(mx|nv)fp\d+|int\d+|q\d+|"
    r"\d+(\.\d+)?bit|\d+bits|gs\d+|group\d+|[qg]\d+_\w+)$"
)
"""Endings that converted models have in their names and their originals have not."""

_log = logging.getLogger("redrafter_mlx")


def own_head(name: str | None, directory: Path | None) -> Path | None:
    """The directory of a head that comes with a target, or has been downloaded for it, or None.

    name       of the target, as the user gave it: a path or a repo
    directory  of the target, if it has one

    Nothing is downloaded here: a known head that has not been downloaded is named in the log.
    """
    if directory is not None and (found := _in_or_beside(directory)):
        return found
    head = known_head(name or "")
    if head is None:
        return None
    cached = try_to_load_from_cache(head, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
        return Path(cached).parent
    _log.info(
        "there is a head for this model: --drafter union:[%s,max_gram] downloads the files that "
        "hold it",
        head,
    )
    return None


def _in_or_beside(directory: Path) -> Path | None:
    if (directory / BESIDE / "config.json").is_file():
        return directory / BESIDE
    inside = [kind for kind in KINDS.values() if kind.inside]
    if inside and (names := tensor_names(directory)):
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if any(kind.recognises(settings, names) for kind in inside):
            return directory
    return None


def download_head(repo: str, revision: str | None, accepted: str) -> Path:
    """The directory of a Hugging Face repo's head; if a target holds it, with its shards only.

    accepted  the names that could be given instead, for errors
    """
    index = places.snapshot(repo, revision, ["config.json", INDEX], accepted) / INDEX
    files = ["*.safetensors"]
    if index.is_file():
        listed = read_json(index)
        weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map of tensor names to files")
        for kind in KINDS.values():
            if kind.inside and (shards := shards_of(kind, weight_map)):
                files = [INDEX, *shards]
    return places.snapshot(repo, revision, ["config.json", *files], accepted)


def known_head(target: str) -> str | None:
    """The Hugging Face repo with a head for a target of this name; None if none is known.

    Example: mlx-community/Qwen3-8B-4bit -> z-lab/Qwen3-8B-DFlash-b16
    """
    found = _bare(Path(target).name)
    return next((pair["head"] for pair in pairs() if _bare(pair["target"]) == found), None)


def pairs() -> list[dict[str, str]]:
    """Targets and their heads, each with its source and date; better heads come first."""
    file = importlib.resources.files("redrafter_mlx") / "loading" / "known_heads.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _bare(name: str) -> str:
    name, before = name.lower(), ""
    while name != before:
        name, before = _WITHOUT.sub("", name), name
    return name
