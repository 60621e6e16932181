"""The layouts in which recurrent heads are kept: one small table of names each.

Our own names (the reference implementation's) are `lm_head.{i}.linear` for residual block i,
`lm_head.{n}` for the output layer after n blocks, `input_proj`, `rnn_u`, `rnn_w`. To add a layout,
add a table to LAYOUTS.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from redrafter_mlx.drafters.checkpoint import LOOKBACK_MODULES, LOOKBACK_NUMBERS, MODEL_TYPE, UNUSED
from redrafter_mlx.drafters.kinds import KINDS
from redrafter_mlx.errors import UserError

CONFIG_KEYS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
WRAPPERS = ("", "module.", "_orig_mod.", "model.")
"""What a training script may have put before every name."""

MODULES = ("input_proj", "rnn_u", "rnn_w", *LOOKBACK_MODULES)
"""Modules that every layout names alike, unless its table says otherwise."""

ALIASES = {"input_projs": "input_proj"}
"""Other names of a module, accepted in every layout."""

BARE = ("d2t", *LOOKBACK_NUMBERS, *UNUSED)
"""Tensors that have the same name in every layout."""


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors and settings of a head.

    name, about  as --from and --to and the table of layouts show them
    block        module of residual block {i}
    output       module of the output layer; {n} is the number of blocks, if it occurs there
    prefix       stands before every name of the head
    modules      our module names to theirs, where they differ
    config       our config keys to theirs; a dot leads into a nested object
    constants    config keys that are always the same
    file         in which the weights are written
    beside       patterns of names that belong to the target, which some tools keep in one file
                 with the head
    packed       may hold mlx's quantised layers
    reduced      its readers know `draft_vocab_size` and `d2t`
    """

    name: str
    about: str
    block: str
    output: str
    prefix: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=lambda: {key: key for key in CONFIG_KEYS})
    constants: Mapping[str, Any] = field(default_factory=lambda: {"model_type": MODEL_TYPE})
    file: str = "model.safetensors"
    beside: tuple[str, ...] = ()
    packed: bool = False
    reduced: bool = False

    def theirs(self, name: str, num_blocks: int) -> str:
        """Our tensor name as this layout writes it.

        Example, tensorrt-llm with 2 blocks: lm_head.2.weight -> drafter.lm_head.weight
        """
        module, dot, parameter = name.rpartition(".")
        if not dot or name in BARE:
            return f"{self.prefix}{name}"
        if match := re.fullmatch(r"lm_head\.(\d+)\.linear", module):
            module = self.block.format(i=match[1])
        elif module == f"lm_head.{num_blocks}":
            module = self.output.format(n=num_blocks)
        else:
            module = self.modules.get(module, module)
        return f"{self.prefix}{module}.{parameter}"

    def ours(self, names: Iterable[str], start: str) -> dict[str, str]:
        """Their tensor names to ours, for those that this layout knows and that have `start`."""
        inner = {name: name[len(start) :] for name in names if name.startswith(start)}
        parameters = ("weight", "bias", "scales", "biases") if self.packed else ("weight", "bias")
        block, output = (_pattern(each, parameters) for each in (self.block, self.output))
        blocks = {m[1] for name in inner.values() if (m := re.fullmatch(block, name))}
        modules = {theirs: ours for ours, theirs in self.modules.items()} | ALIASES
        known = {}
        for name, rest in inner.items():
            module, _, parameter = rest.rpartition(".")
            if match := re.fullmatch(block, rest):
                known[name] = f"lm_head.{match[1]}.linear.{parameter}"
            elif match := re.fullmatch(output, rest):
                index = match[1] if match.lastindex == 2 else len(blocks)
                known[name] = f"lm_head.{index}.{parameter}"
            elif rest in BARE:
                known[name] = rest
            elif parameter in parameters and modules.get(module, module) in MODULES:
                known[name] = f"{modules.get(module, module)}.{parameter}"
        return known

    def belongs_to_target(self, name: str) -> bool:
        """Whether a tensor in the file is the target's, not the head's."""
        return any(fnmatchcase(name, pattern) for pattern in self.beside)


def _pattern(template: str, parameters: Collection[str]) -> str:
    """A regular expression for a module's tensors: group 1 is the number, the last the parameter.

    Example: lm_head.{n} -> lm_head\\.(0|[1-9][0-9]{0,5})\\.(weight|bias)
    """
    number = r"(0|[1-9][0-9]{0,5})"
    module = re.sub(r"\\\{[in]\\\}", lambda _: number, re.escape(template))
    return rf"{module}\.({'|'.join(parameters)})"


APPLE = Layout(
    name="apple",
    about="the reference implementation, 16- or 32-bit",
    block="lm_head.{i}.linear",
    output="lm_head.{n}",
    constants={
        "model_type": MODEL_TYPE,
        "architectures": ["Drafter"],
        "num_lookback_tokens": -1,  # unused, but its class has it
    },
    reduced=True,
)
MLX = dataclasses.replace(
    APPLE,
    name="mlx",
    about="what this package loads: the same names, also quantised",
    constants={"model_type": MODEL_TYPE},
    packed=True,
)
LM_HEADS = dataclasses.replace(
    APPLE,
    name="lm-heads",
    about="an older training script",
    block="lm_heads.{i}.linear",
    output="lm_heads.{n}",
    modules={"input_proj": "input_projs"},
    reduced=False,
)
MEDUSA = dataclasses.replace(
    APPLE,
    name="medusa",
    about="numbered like a first Medusa head",
    block="0.{i}.linear",
    output="0.{n}",
    reduced=False,
)
TENSORRT_LLM = Layout(
    name="tensorrt-llm",
    about="the drafter's part of a TensorRT-LLM checkpoint",
    block="layers.{i}.linear",
    output="lm_head",
    prefix="drafter.",
    config={
        "vocab_size": "vocab_size",
        "hidden_size": "redrafter_hidden_size",
        "exit_dim": "redrafter_exit_dim",
        "num_draft_layers": "redrafter_num_layers",
        "rnn": "redrafter_is_rnn",
    },
    constants={"architecture": "ReDrafterForCausalLM"},
    file="rank0.safetensors",
    beside=("transformer.*", "lm_head.*", "base_model.*"),
)
MODELOPT = Layout(
    name="modelopt",
    about="a model trained with NVIDIA ModelOpt, the head beside the target",
    block="lm_head.{i}.linear",
    output="lm_head.{n}",
    prefix="drafter.",
    config={
        "vocab_size": "vocab_size",
        **{key: f"redrafter.{key}" for key in CONFIG_KEYS if key != "vocab_size"},
    },
    constants={},
    beside=("model.*", "lm_head.*", "transformer.*", "gpt_neox.*", "embed_out.*", "llm.*"),
)
LAYOUTS = {layout.name: layout for layout in (APPLE, MLX, LM_HEADS, MEDUSA, TENSORRT_LLM, MODELOPT)}


@dataclass(frozen=True)
class Recognised:
    """A layout, and the names that it knows to ours."""

    layout: Layout
    ours: dict[str, str]


def recognise(where: object, names: Collection[str], wanted: str | None = None) -> Recognised:
    """The layout that knows most of the tensors.

    wanted  only this one

    Raises UserError if none knows a residual block or an output layer among them.
    """
    found = []
    for layout in LAYOUTS.values():
        for wrapper in WRAPPERS:
            found.append(Recognised(layout, layout.ours(names, wrapper + layout.prefix)))
            bare = Recognised(layout, layout.ours(names, wrapper))
            if len(bare.ours) == len(names):  # else lm_head.weight may be the target's
                found.append(bare)
    found = [each for each in found if any("lm_head." in name for name in each.ours.values())]
    best = max(found, key=lambda each: len(each.ours), default=None)
    if wanted is not None:
        mine = [each for each in found if each.layout.name == wanted]
        if not mine:
            looks = f"; it looks like {best.layout.name}: leave --from out" if best else ""
            raise UserError(f"{where}: is not in the layout --from {wanted}{looks}")
        return max(mine, key=lambda each: len(each.ours))
    if best is None:
        raise UserError(
            f"{where}: no draft head in any known layout "
            f"({', '.join(dict.fromkeys([*LAYOUTS, *KINDS]))}); it holds {some(names)}"
        )
    return best


def some(names: Collection[str]) -> str:
    """A few of the names, for messages."""
    shown = ", ".join(sorted(names)[:4]) or "no tensors"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def setting(settings: Mapping[str, Any], path: str) -> Any:
    """A config value by its dotted path; None if it is not there."""
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def settings_of(layout: Layout, values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a head in `layout`, from our keys and values."""
    settings: dict[str, Any] = dict(layout.constants)
    for key, value in values.items():
        *outer, last = layout.config.get(key, key).split(".")
        place = settings
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return settings
