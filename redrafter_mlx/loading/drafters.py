"""Loads drafters: the demo's, from a directory or Hugging Face, or those that need no files."""

from __future__ import annotations

import importlib.resources
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.config import DrafterOptions, parse_keywords
from redrafter_mlx.drafters.cascade import CascadeDrafter
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.drafters.kinds import is_taken_out, recognised
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
from redrafter_mlx.loading import hub
from redrafter_mlx.loading.hub import DEMO, check_config, check_revision
from redrafter_mlx.loading.known_heads import download_head, own_head
from redrafter_mlx.loading.places import expanded, local_directory
from redrafter_mlx.loading.precision import compute_in_float32
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.pricing.experience import read as read_experience
from redrafter_mlx.target.adapter import Target, adapt

_log = logging.getLogger("redrafter_mlx")

DRAFTER_NAMES = f"'demo', a drafter directory or a Hugging Face repo as org/name ({POSSIBLE})"

logger = logging.getLogger("redrafter_mlx")


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
            kind in `spec.HEADS`, in the layout in which it was published; also as `KIND:NAME`.
            `max_gram`: what followed earlier in the text. `model:NAME`: a smaller language model.
            `union:[A,B]`: the candidates of several drafters. `cascade:[A,B]`: drafters that draft
            for each other. `auto`: Max-Gram, united with the target's own head if there is one:
            inside the model, beside it (MODEL/drafter), or a known head downloaded before.
        model: the target, as `load` returns it. Its first use here checks, with a small probe,
            that it can verify a tree.
        revision: branch, tag or commit, if the name is a single Hugging Face repo.
        tokenizer: the target's, as `load` returns it; needed for `model:NAME` and for bigrams.
        options: the fields of config.DrafterOptions.

    Returns:
        A drafter for `stream_generate(..., drafter=)`.

    Raises:
        UserError: no such drafter, damaged files, a drafter made for another target, drafters that
            cannot be combined, an option that cannot be honoured, or a target that cannot verify
            trees; the message says which, and why.
    """
    (chosen,) = parse_keywords(options, DrafterOptions)
    spec = parse(str(name_or_path), chosen)
    if revision is not None and spec.kind not in (HEAD, *HEADS, MODEL):
        raise UserError(f"revision {revision!r} needs a single Hugging Face repo, not {spec}")
    return _Loader(model, tokenizer, chosen, revision).load(spec)


def load_if_possible(
    name: str, model: nn.Module, tokenizer: Any, options: DrafterOptions, is_wanted: bool
) -> Drafter | None:
    """`load_drafter`; None, with a warning, if it fails and nobody asked for a drafter.

    is_wanted  whether the user named the drafter; setting an option of drafters asks for it too
    """
    try:
        return load_drafter(name, model, tokenizer=tokenizer, **asdict(options))
    except UserError as error:
        if is_wanted or options != DrafterOptions():
            raise
        _log.warning("plain decoding, because %s", error)
        return None


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
        if name == DEMO:
            return UnionDrafter([self._head(Spec(HEAD, DEMO)), max_gram])
        head = own_head(name, getattr(self.model, "_redrafter_directory", None))
        if head is None:
            return max_gram
        try:
            return UnionDrafter([self._head(Spec(HEAD, str(head))), max_gram])
        except UserError as error:
            logger.warning("drafting without %s: %s", head, error)
            return max_gram

    def _head(self, spec: Spec) -> Drafter:
        """A trained head, of the kind that its files show it to be."""
        directory = resolve_drafter(spec.name, self.revision)
        settings = self._settings(directory)
        kind = recognised(settings, tensor_names(directory))
        found = RECURRENT if kind is None else kind.name
        if spec.kind not in (HEAD, found):
            raise UserError(
                f"{directory} does not hold a head of the kind {spec.kind}"
                + (f" but {found}: give {found}:{spec.name}" if kind else "")
            )
        if kind is None:
            return _recurrent(directory, self.model)
        target = adapt(self.model)
        try:
            head, ids = load_published(kind, directory, target.dtype, settings)
        except UserError as error:
            if (directory / "config.json").exists():
                raise
            raise UserError(f"{error}; it has no config.json, so the target's was read") from error
        if mx.default_device() == mx.cpu:
            compute_in_float32(head)
        try:
            return kind.drafter(target, head, ids, read_experience(directory))
        except UserError as error:
            raise UserError(f"{directory}: {error}") from error

    def _settings(self, directory: Path) -> dict[str, Any]:
        """config.json of a head; the target's, for one that was taken out of it without any."""
        own = directory / "config.json"
        of_target = getattr(self.model, "_redrafter_directory", None)
        return read_json(own if own.exists() or of_target is None else of_target / "config.json")

    def _max_gram(self) -> MaxGramDrafter:
        o, vocab_size = self.options, adapt(self.model).vocab_size
        bigrams = memory = None
        if o.max_gram_memory is not None:
            path = expanded(o.max_gram_memory)
            memory = Memory.load(path, o.max_gram_memory_tokens, vocab_size)
        if o.max_gram_bigrams is not None:
            path = expanded(o.max_gram_bigrams)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                message = f"--max-gram-bigrams {path}: {one_line(error)}; give a UTF-8 text file"
                raise UserError(message) from error
            bigrams = count_bigrams(self._needs_tokenizer("bigrams").encode(text))
        return MaxGramDrafter(bigrams=bigrams, memory=memory)

    def _model(self, name: str) -> ModelDrafter:
        tokenizer = self._needs_tokenizer(f"model:{name}")
        model, own_tokenizer = hub.load(name, revision=self.revision)
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
    """A recurrent head for a target, and the token ids (D,) that it can propose.

    Args:
        target: the weights get its dtype.
        name_or_path, revision: as in `resolve_drafter`.

    Raises:
        UserError: no such drafter, damaged files, or a drafter made for another target.
    """
    directory = resolve_drafter(name_or_path, revision)
    head, d2t = load_head(directory, target.dtype)
    for name, found, needed in (
        ("hidden_size", head.config.hidden_size, target.hidden_size),
        ("vocab_size", head.config.vocab_size, target.vocab_size),
    ):
        if found != needed:
            raise UserError(
                f"{directory} was made for another target: its {name} is {found}, but that of "
                f"{target.name} is {needed}; give a drafter trained for this model"
            )
    return head, d2t


def resolve_drafter(name_or_path: str, revision: str | None = None) -> Path:
    """The local directory of a drafter: *.safetensors, and config.json, which only heads may lack
    that lie inside targets (MTP).

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
    check_revision(name, revision)
    if name == DEMO:
        directory = Path(str(importlib.resources.files("redrafter_mlx") / "demo_drafter"))
    else:
        directory = local_directory(name, DRAFTER_NAMES) or download_head(
            name, revision, DRAFTER_NAMES
        )
    if (directory / "config.json").exists() or not is_taken_out(tensor_names(directory)):
        check_config(directory, f"give {DRAFTER_NAMES}")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} has no *.safetensors file, so it is not a drafter")
    return directory
