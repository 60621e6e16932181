"""Where a model or a drafter comes from: a directory, a GGUF file, Hugging Face, the demo."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from redrafter_mlx.config import DrafterOptions, parse_keywords
from redrafter_mlx.drafters.cascade import CascadeDrafter
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.drafters.kinds import recognised
from redrafter_mlx.drafters.max_gram import MaxGramDrafter, Memory, count_bigrams
from redrafter_mlx.drafters.model import ModelDrafter, check_tokenizers, warn_if_larger
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.drafters.spec import (
    AUTO,
    CASCADE,
    HEAD,
    HEADS,
    MAX_GRAM,
    MODEL,
    POSSIBLE,
    RECURRENT,
    UNION,
    Spec,
    cascade_matrix,
    parse,
)
from redrafter_mlx.drafters.tensors import read_json, tensor_names
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.importer import LAYOUT_VERSION, import_gguf
from redrafter_mlx.loading.demo import DEMOS, demo_target
from redrafter_mlx.loading.known_heads import download_head, own_head
from redrafter_mlx.loading.places import TARGET_NAMES, expanded, local_directory, snapshot
from redrafter_mlx.loading.precision import compute_in_float32
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import build_once, cache_directory, conversions, one_line
from redrafter_mlx.pricing.experience import read as read_experience
from redrafter_mlx.target import parallel
from redrafter_mlx.target.adapter import Target, adapt

DEMO = "demo"

DRAFTER_NAMES = f"'demo', a drafter directory or a Hugging Face repo as org/name ({POSSIBLE})"

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
    On a CPU every model is computed in float32, because 16-bit and quantised products use no
    BLAS there and accumulate in 16 bits; it is then read at once even with `lazy`.

    Args:
        path_or_hf_repo: the name, see above. A directory called `demo` is `./demo`.
        tokenizer_config, model_config, adapter_path, lazy, return_config, trust_remote_code:
            as in `mlx_lm.load`.
        revision: branch, tag or commit; Hugging Face repos only.

    Returns:
        (model, tokenizer) as `mlx_lm.load` returns them, plus the config with `return_config`.

    Raises:
        UserError: no such model, or it cannot be loaded; the message says why.
    """
    directory = resolve_target(path_or_hf_repo, revision)
    shared = parallel.group().size() > 1
    try:
        model, tokenizer, config = mlx_lm.load(
            str(directory),
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=adapter_path,
            lazy=lazy or shared,
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot load {path_or_hf_repo}: {one_line(error)}; "
            f"{_way_out(str(path_or_hf_repo), directory)}"
        ) from error
    if mx.default_device() == mx.cpu:
        compute_in_float32(model)
        config.pop("quantization", None)
    if shared:
        _split(model, str(path_or_hf_repo))
    model._redrafter_name, model._redrafter_directory = str(path_or_hf_repo), directory
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def _split(model: nn.Module, name: str) -> None:
    """Keep this process's part of the model; one that follows another ends with it."""
    processes = parallel.group().size()
    try:
        model.shard(parallel.group())
        device.finish(model.parameters())
        target = adapt(model) if parallel.is_follower() else None
    except (AttributeError, ValueError, UserError) as error:
        raise UserError(
            f"{name} cannot be split over {processes} processes: {one_line(error)}; the numbers of "
            "its heads must be multiples of theirs, and mlx-lm must know how"
        ) from error
    if target is not None:
        parallel.follow(target)
        raise SystemExit(0)


def load_drafter(
    name_or_path: str,
    model: nn.Module,
    revision: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Drafter:
    """Load a drafter for a target model.

    Args:
        name_or_path: `demo`, a directory, or a Hugging Face repo `org/name`: a trained head of any
            kind of `spec.HEADS`, in the layout in which it was published; also as `KIND:NAME`.
            `max_gram`: what followed earlier in the text. `model:NAME`: a smaller language model.
            `union:[A,B]`: the candidates of several. `cascade:[A,B]`: drafters that draft for each
            other. `auto`: Max-Gram, united with the target's own head if there is one: inside the
            model or beside it (MODEL/drafter), or a known one that was downloaded before.
        model: the target, as `load` returns it. It is probed here, once, for whether it can
            verify a tree.
        revision: branch, tag or commit; for a name that is one Hugging Face repo.
        tokenizer: the target's, as `load` returns it; needed for a model and for bigrams.
        options: the fields of config.DrafterOptions.

    Returns:
        A drafter for `stream_generate(..., drafter=)`.

    Raises:
        UserError: no such drafter, damaged files, a drafter made for another target, drafters that
            cannot be combined, an option that cannot be honoured, or a target that cannot verify
            trees; the message says which and why.
    """
    (chosen,) = parse_keywords(options, DrafterOptions)
    spec = parse(str(name_or_path), chosen)
    if revision is not None and spec.kind not in (HEAD, *HEADS, MODEL):
        raise UserError(f"revision {revision!r} is for one Hugging Face repo, not for {spec}")
    return _Loader(model, tokenizer, chosen, revision).load(spec)


@dataclass(frozen=True)
class _Loader:
    """Makes the drafters of one target."""

    model: nn.Module
    tokenizer: Any
    options: DrafterOptions
    revision: str | None

    def load(self, spec: Spec) -> Drafter:
        if spec.kind == CASCADE:
            k = cascade_matrix(self.options.cascade_k, spec)
            levels = [self.load(member) for member in spec.members]
            return CascadeDrafter(levels, k, self.options.lenience)
        if spec.kind == UNION:
            return UnionDrafter([self.load(member) for member in spec.members])
        if spec.kind == AUTO:
            return self._auto()
        if spec.kind == MAX_GRAM:
            return self._max_gram()
        if spec.kind == MODEL:
            return self._model(spec.name)
        return self._head(spec)

    def _auto(self) -> Drafter:
        max_gram = self._max_gram()
        name = getattr(self.model, "_redrafter_name", None)
        head = (
            DEMO
            if name == DEMO
            else own_head(name, getattr(self.model, "_redrafter_directory", None))
        )
        if head is None:
            return max_gram
        try:
            return UnionDrafter([self._head(Spec(HEAD, str(head))), max_gram])
        except UserError as error:
            if name == DEMO:
                raise
            logger.warning("drafting without %s: %s", head, error)
            return max_gram

    def _head(self, spec: Spec) -> Drafter:
        """A trained head of the kind that its files hold."""
        directory = resolve_drafter(spec.name, self.revision)
        settings = read_json(directory / "config.json")
        kind = recognised(settings, tensor_names(directory))
        found = RECURRENT if kind is None else kind.name
        if spec.kind not in (HEAD, found):
            raise UserError(
                f"{directory} is no {spec.kind} head"
                + (f" but {found}: give {found}:{spec.name}" if kind else "")
            )
        if kind is None:
            return _recurrent(directory, self.model)
        target = adapt(self.model)
        head, ids = load_published(kind, directory, target.dtype)
        if mx.default_device() == mx.cpu:
            compute_in_float32(head)
        try:
            return kind.drafter(target, head, ids, read_experience(directory))
        except UserError as error:
            raise UserError(f"{directory}: {error}") from error

    def _max_gram(self) -> MaxGramDrafter:
        o, vocab_size = self.options, adapt(self.model).vocab_size
        bigrams = memory = None
        if o.max_gram_memory is not None:
            path = expanded(o.max_gram_memory)
            memory = Memory.load(path, o.max_gram_memory_tokens, vocab_size)
        if o.max_gram_bigrams is not None:
            text = _read_text(expanded(o.max_gram_bigrams), "--max-gram-bigrams")
            bigrams = count_bigrams(self._needs_tokenizer("bigrams").encode(text))
        return MaxGramDrafter(bigrams=bigrams, memory=memory)

    def _model(self, name: str) -> ModelDrafter:
        tokenizer = self._needs_tokenizer(f"model:{name}")
        model, own_tokenizer = load(name, revision=self.revision)
        check_tokenizers(tokenizer, own_tokenizer, name)
        warn_if_larger(self.model, model, name)
        return ModelDrafter(model, adapt(self.model).vocab_size)

    def _needs_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise UserError(f"{what} needs the target's tokenizer: load_drafter(..., tokenizer=)")
        return self.tokenizer


def _recurrent(directory: Path, model: nn.Module) -> RecurrentDrafter:
    target = adapt(model)
    head, d2t = load_head_of(target, str(directory))
    if mx.default_device() == mx.cpu:
        compute_in_float32(head)
    view = target.tap(head.config.fused_layers, whole_text=bool(head.config.lookback_heads))
    output = target.output_layer if head.config.tied_output else None
    return RecurrentDrafter(head, d2t, target.embed, output, view, read_experience(directory))


def load_head_of(
    target: Target, name_or_path: str, revision: str | None = None
) -> tuple[RecurrentHead, mx.array]:
    """A recurrent head for a target, and the token ids (D,) it can propose.

    Args:
        target: whose dtype its weights get.
        name_or_path, revision: as in `resolve_drafter`.

    Raises:
        UserError: no such drafter, damaged files, or a drafter made for another target.
    """
    directory = resolve_drafter(name_or_path, revision)
    head, d2t, config = load_head(directory, target.dtype)
    for name, found, needed in (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
    ):
        if found != needed:
            raise UserError(
                f"{directory} was made for another target: its {name} is {found}, that of "
                f"{target.name} is {needed}; give a drafter trained for this model"
            )
    return head, d2t


def resolve_target(name_or_path: str, revision: str | None = None) -> Path:
    """The local directory of a target model, downloaded or converted first where needed.

    Args:
        name_or_path: as in `load`.
        revision: branch, tag or commit; Hugging Face repos only.

    Returns:
        The directory, which has a config.json; for a repo, the snapshot in the Hugging Face cache.

    Raises:
        UserError: no such model.
    """
    name = str(name_or_path)
    _check_revision(name, revision)
    if name in DEMOS:
        directory = demo_target(name)
    elif _is_gguf(name):
        directory = _converted(expanded(name))
    else:
        directory = local_directory(name, TARGET_NAMES) or snapshot(
            name, revision, DEFAULT_ALLOW_PATTERNS, TARGET_NAMES
        )
    _check_config(directory, _way_out(name, directory))
    return directory


def resolve_drafter(name_or_path: str, revision: str | None = None) -> Path:
    """The local directory of a drafter: config.json and *.safetensors.

    Args:
        name_or_path: `demo` (the drafter shipped with this package, trained for the demo
            target), a local directory, or a Hugging Face repo `org/name`.
        revision: branch, tag or commit; Hugging Face repos only.

    Returns:
        The directory; for a repo, the snapshot in the Hugging Face cache.

    Raises:
        UserError: no such drafter, or its files are missing.
    """
    name = str(name_or_path)
    _check_revision(name, revision)
    if name == DEMO:
        directory = Path(str(importlib.resources.files("redrafter_mlx") / "demo_drafter"))
    else:
        directory = local_directory(name, DRAFTER_NAMES) or download_head(
            name, revision, DRAFTER_NAMES
        )
    _check_config(directory, f"give {DRAFTER_NAMES}")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds no *.safetensors file, so it is not a drafter")
    return directory


def _read_text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: {one_line(error)}; give a UTF-8 text file") from error


def _check_revision(name: str, revision: str | None) -> None:
    if revision is not None and (name in DEMOS or expanded(name).exists()):
        raise UserError(
            f"revision {revision!r} is for Hugging Face repos, and {name} is not one: leave it out"
        )


def _is_gguf(name: str) -> bool:
    return expanded(name).suffix == ".gguf" and expanded(name).is_file()


def _way_out(name: str, directory: Path) -> str:
    """What to do about a target's directory that cannot be loaded."""
    if name in DEMOS or _is_gguf(name):  # then we have made it, and somebody has changed it
        return f"delete {directory}, and the next run makes it anew"
    return "what is needed is a complete model of a type that mlx-lm supports"


def _check_config(directory: Path, way_out: str) -> None:
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
    """The cached conversion of a local GGUF file; a changed file is converted anew."""
    source = source.resolve()
    stat = source.stat()
    identity = f"{source}\n{stat.st_size}\n{stat.st_mtime_ns}\n{LAYOUT_VERSION}"
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def build(destination: Path) -> None:
        logger.info("converting %s to %s", source, cache_directory())
        import_gguf(source, destination)

    return build_once(conversions() / name, build)
