"""A recurrent head in any of its layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.checkpoint import (
    UNUSED,
    check_flag,
    count_blocks,
    empty_head,
    fused_layers,
    lookback,
    own_settings,
    tied_output,
)
from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.drafters.tensors import (
    check_draft_size,
    check_names_and_shapes,
    check_size,
    draft_ids,
    quantize_like,
)
from redrafter_mlx.errors import UserError

from .head import Form, Head, Packing, Words, check_type, offsets_in, packing_of
from .layouts import LAYOUTS, MLX, Layout, Recognised, recognise, setting, settings_of
from .safetensors import Tensor
from .sources import Source


class Recurrent(Head):
    """A recurrent head."""

    @property
    def kind(self) -> str:
        return "recurrent"

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def words(self) -> Words:
        c = self.config
        state = "recurrent state" if c.rnn else "summed embeddings as state"
        return Words(
            title="Recurrent draft head",
            about="A recurrent draft head ([ReDrafter](https://arxiv.org/abs/2403.09919)).",
            shape=f"hidden size {c.hidden_size:,}, exit size {c.exit_dim:,}, {c.num_blocks} "
            f"residual blocks, {state}",
            tags=("redrafter", "speculative-decoding", "recurrent-drafter"),
        )

    def form(self, to: str | None) -> Form:
        layout = LAYOUTS[to or MLX.name]
        extensions = ", ".join(own_settings(self.config))
        if extensions and layout is not MLX:
            raise UserError(
                f"--to {layout.name}: {extensions} of {self.source.path} are known to this "
                "package alone; train a head with --output-layer trained, --lookback-heads 0 and "
                "without --fused-layers"
            )
        return Form(
            layout=layout.name,
            file=layout.file,
            theirs=lambda name: layout.theirs(name, self.config.num_blocks),
            settings=lambda ids, packing: self._settings(layout, ids, packing),
            packed=layout.packed,
            reduced=layout.reduced,
            loaded=layout is MLX,
        )

    def may_be_packed(self, name: str) -> bool:
        return name.endswith(".weight")

    def bytes_by_part(self) -> dict[str, int]:
        parts = ("recurrence", "projection", "blocks", "lookback", "output")
        found: dict[str, int] = dict.fromkeys(parts, 0)
        for name, tensor in self.tensors.items():
            found[self._part(name)] += tensor.nbytes
        return found

    def facts(self) -> dict[str, Any]:
        c = self.config
        return {
            "exit_dim": c.exit_dim,
            "residual_blocks": c.num_blocks,
            "rnn": c.rnn,
            "tied_output": c.tied_output,
            "fused_layers": list(c.fused_layers),
            "lookback_heads": c.lookback_heads,
        }

    def _part(self, name: str) -> str:
        module = name.rpartition(".")[0]
        if module.startswith("rnn_"):
            return "recurrence"
        if module == "input_proj":
            return "projection"
        if module.startswith("lookback"):
            return "lookback"
        return "output" if module in self.outputs else "blocks"

    def _settings(self, layout: Layout, ids: np.ndarray, packing: Packing | None) -> dict[str, Any]:
        c = self.config
        values = {
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "exit_dim": c.exit_dim,
            "num_draft_layers": c.num_blocks,
            "rnn": c.rnn,
            **own_settings(c),
        }
        if len(ids) < c.vocab_size:
            values["draft_vocab_size"] = len(ids)
        settings = settings_of(layout, values)
        if packing:
            settings["quantization"] = dataclasses.asdict(packing)
        return settings


def read_recurrent(source: Source, wanted: str | None = None) -> Recurrent:
    """The recurrent head in a checkpoint.

    wanted  the only layout to try

    Raises UserError that names the tensor or the setting that is wrong.
    """
    known = recognise(source.path, source.tensors, wanted)
    tensors, beside = _by_our_names(source, known)
    notes = [f"{len(beside)} tensors of the target beside the head are left out"] if beside else []
    num_blocks = count_blocks(tensors)
    theirs = {ours: name for name, ours in known.ours.items()}
    name_of = lambda name: theirs.get(name) or known.layout.theirs(name, num_blocks)
    offsets, lookup = tensors.pop("d2t", None), tensors.get("t2d")
    for name in sorted(UNUSED.keys() & tensors.keys()):
        del tensors[name]
        notes.append(f"{name_of(name)} is dropped: {UNUSED[name]}")
    packing = packing_of(source, tensors)
    sizes = _Sizes(source, known.layout, tensors, packing, num_blocks, name_of)
    config = sizes.head_config(offsets, lookup)
    notes += sizes.notes
    head = empty_head(source.config_path, config)
    parameters = sum(x.size for _, x in tree_flatten(head.parameters()))
    if packing:
        quantize_like(source.config_path.parent, head, source.settings["quantization"], tensors)
    expected = dict(tree_flatten(head.parameters()))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shown = {name: name_of(name) for name in expected.keys() | shapes.keys()}
    check_names_and_shapes(source.path, {n: x.shape for n, x in expected.items()}, shapes, shown)
    for name, x in expected.items():
        check_type(source.path, tensors[name], shown[name], packed=x.dtype == mx.uint32)
    sizes = config.vocab_size, config.draft_vocab_size
    ids = draft_ids(source.path, *sizes, offsets_in(source.path, offsets))
    return Recurrent(
        source=source,
        layout=known.layout.name,
        config=config,
        tensors=tensors,
        draft_ids=ids,
        packing=packing,
        notes=notes,
        parameters=parameters,
        outputs=(f"lm_head.{config.num_blocks}",),
        beside=beside,
    )


def _by_our_names(source: Source, known: Recognised) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The head's tensors, and the names of the target's beside them."""
    unknown = source.tensors.keys() - known.ours.keys()
    beside = frozenset(filter(known.layout.belongs_to_target, unknown))
    if others := sorted(unknown - beside):
        raise UserError(
            f"{source.path}: holds tensors that no part of the head uses "
            f"(layout {known.layout.name}): {', '.join(others)}"
        )
    tensors: dict[str, Tensor] = {}
    for name, ours in sorted(known.ours.items()):
        if ours in tensors:
            raise UserError(f"{source.path}: {name} and {tensors[ours].name} are the same tensor")
        tensors[ours] = source.tensors[name]
    return tensors, beside


class _Sizes:
    """The shape of a head from its tensors, compared with what its config says."""

    def __init__(
        self, source: Source, layout: Layout, tensors: Mapping[str, Tensor],
        packing: Packing | None, num_blocks: int, name_of,
    ):  # fmt: skip
        self._source, self._layout, self._tensors = source, layout, tensors
        self._packing, self._num_blocks, self._name_of = packing, num_blocks, name_of
        self.notes: list[str] = []

    def head_config(self, offsets: Tensor | None, lookup: Tensor | None) -> HeadConfig:
        """All sizes; a setting that the tensors contradict is an error."""
        where, settings = self._source.config_path, self._source.settings
        tied, fused = tied_output(where, settings), fused_layers(where, settings)
        rnn = any(name.startswith("rnn_") for name in self._tensors)
        if tied:  # its rows are the target's: only d2t tells how many there are
            output = "input_proj.weight"
            exit_dim = self._matrix(output)[0]
            draft_size = offsets.shape[0] if offsets else self._setting("vocab_size")
        else:
            output = f"lm_head.{self._num_blocks}.weight"
            draft_size, exit_dim = self._matrix(output)
        evidence, hidden = self._hidden_size(output, len(fused))
        self._check("exit_dim", exit_dim, output)
        self._check("hidden_size", hidden, evidence)
        self._check_rnn(rnn)
        self._check_blocks()
        vocab_size = self._vocab_size(output, draft_size, offsets, lookup)
        sizes = vocab_size, hidden, exit_dim, self._num_blocks, rnn, draft_size
        looks = lookback(where, settings)
        return HeadConfig(*sizes, tied_output=tied, fused_layers=fused, **looks)

    def _matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a weight, counted unpacked."""
        if name not in self._tensors:
            raise UserError(f"{self._source.path}: lacks the tensors {self._name_of(name)}")
        shape = self._tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{self._source.path}: {self._name_of(name)} has shape {shape}")
        rows, columns = shape
        if self._packing and f"{name.removesuffix('.weight')}.scales" in self._tensors:
            columns = columns * 32 // self._packing.bits
        return check_size(self._source.path, name, rows), columns

    def _hidden_size(self, output: str, fused: int) -> tuple[str, int]:
        """The tensor that tells it, and the size."""
        for name in ("rnn_w.weight", "rnn_u.weight"):
            if name in self._tensors:
                return name, self._matrix(name)[0]
        name = "input_proj.weight" if "input_proj.weight" in self._tensors else output
        return name, self._matrix(name)[1] // (2 + fused)

    def _setting(self, key: str) -> Any:
        found = setting(self._source.settings, self._layout.config.get(key, key))
        return self._source.settings.get(key) if found is None else found

    def _key(self, key: str) -> str:
        theirs = self._layout.config.get(key, key)
        return theirs if setting(self._source.settings, theirs) is not None else key

    def _check(self, key: str, found: int, evidence: str) -> None:
        given = self._setting(key)
        if given is None:
            return
        where = self._source.config_path
        if check_size(where, self._key(key), given) != found:
            shape = self._tensors[evidence].shape
            raise UserError(
                f"{where}: {self._key(key)} is {given}, but {self._name_of(evidence)} has shape "
                f"{shape}, which makes it {found}: one of them is wrong"
            )

    def _check_rnn(self, found: bool) -> None:
        given = self._setting("rnn")
        where = self._source.config_path
        if given is not None and check_flag(where, "rnn", given) != found:
            tensors = "there are" if found else "there are no"
            raise UserError(
                f"{where}: {self._key('rnn')} is {str(given).lower()}, but {tensors} rnn_u and "
                "rnn_w tensors: one of them is wrong"
            )

    def _check_blocks(self) -> None:
        given = self._setting("num_draft_layers")
        if given is not None and given != self._num_blocks:
            self.notes.append(
                f"{self._key('num_draft_layers')} is {given} in config.json; the tensors have "
                f"{self._num_blocks} blocks, and they count"
            )

    def _vocab_size(
        self, output: str, draft_size: int, offsets: Tensor | None, lookup: Tensor | None
    ) -> int:
        where, given = self._source.config_path, self._setting("vocab_size")
        if self._setting("draft_vocab_size") is not None:
            self._check("draft_vocab_size", draft_size, output)
        if given is not None:
            vocab_size = check_size(where, self._key("vocab_size"), given)
            if offsets is None and self._setting("draft_vocab_size") is None:
                self._check("vocab_size", draft_size, output)
            check_draft_size(where, draft_size, vocab_size)
            return vocab_size
        if offsets is None:
            return draft_size
        if lookup is None or len(lookup.shape) != 1 or lookup.shape[0] < draft_size:
            raise UserError(
                f"{where}: vocab_size is missing, and a reduced vocabulary does not tell it: write "
                '{"vocab_size": N} there, N being the target\'s'
            )
        return check_size(where, "t2d", lookup.shape[0])
