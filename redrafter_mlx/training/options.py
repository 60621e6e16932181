"""Every option of training, with its only default, its help text and its allowed range."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter_mlx.config import Options, option
from redrafter_mlx.errors import UserError


@dataclass(frozen=True)
class DataOptions(Options):
    """What the target writes to learn from; --data gives it prompts."""

    data: str | None = option(
        None,
        "prompts to answer: JSON lines of messages, turns, prompt or text, or a .txt file "
        "(default: the model writes its own)",
        type=str,
        metavar="FILE",
    )
    skip_bad: bool = option(False, "leave broken lines of --data out")
    data_tokens: int = option(1_000_000, "tokens of answers to write", low=1)
    data_minutes: float | None = option(
        None, "begin no batch of conversations that would end later than this", low=0.0, type=float
    )
    answer_tokens: int = option(384, "most tokens of an answer", low=1)
    rows: int | None = option(
        None, "conversations side by side (default: what --memory allows)", low=1, type=int
    )
    jobs: int | None = option(
        None,
        "processes that write side by side, and that share the batches of an update (default: "
        "one for each core, at most 4, on a CPU; else 1)",
        low=1,
        high=64,
        type=int,
    )
    columns: int = option(512, "tokens of a row; longer conversations are cut", low=16)
    memory: float | None = option(
        None, "most memory to use, in GB (default: half of the machine's)", low=0.0, type=float
    )
    seed: int = option(0, "same seed and model, same data", low=0, high=2**64 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.skip_bad, bool):
            raise UserError(f"--skip-bad must be true or false, not {self.skip_bad!r}")
        if not (self.data is None or isinstance(self.data, str)):
            raise UserError(f"--data must be the path of a file, not {self.data!r}")


@dataclass(frozen=True)
class HeadOptions(Options):
    """Shape of the draft head to train."""

    head: str = option(
        "recurrent",
        "kind: recurrent (ReDrafter), medusa, eagle3 or dflash",
        type=str,
        choices=["recurrent", "medusa", "eagle3", "dflash"],
    )
    exit_dim: int | None = option(
        None, "width before the output layer (default: the target's hidden size)", low=8, type=int
    )
    blocks: int = option(2, "residual blocks before the output layer", low=0, high=64)
    no_rnn: bool = option(False, "a recurrent head's state only adds up the tokens' embeddings")
    layers: int | None = option(
        None, "decoder layers of a dflash head (default: 2)", low=1, high=16, type=int
    )
    draft_vocab: int = option(
        4096, "token ids it can propose whatever the prompt; 0: all of the target's", low=0
    )
    output_layer: str = option(
        "tied",
        "tied (rows of the target's own head; also proposes the prompt's ids) or "
        "trained (stored rows of its own)",
        type=str,
        choices=["tied", "trained"],
    )
    fused_layers: tuple[int, ...] = option(
        (), "layers of the target to read: beside its last hidden state, or, by an eagle3 or "
        "dflash head, instead of it (default there: three)", type=int, nargs="*", metavar="LAYER",
    )  # fmt: skip
    lookback_heads: int | None = option(
        None, "attention heads that look back at the text so far; 0: none, as in the paper "
        "(default: 2, or as many as the head of --start-from has)", low=0, high=64, type=int,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingOptions(Options):
    """How the head is trained."""

    loss: str = option(
        "kl",
        "kl, hard (the likeliest token alone), acceptance (LK) or top_k (HASS)",
        type=str,
        choices=["kl", "hard", "acceptance", "top_k"],
    )
    steps: int | None = option(
        None, "updates to take (default: as many as the time allows)", low=1, type=int
    )
    learning_rate: float = option(5e-4, "highest learning rate", low=0.0)
    windows: int = option(16, "windows of 16 positions in a batch", low=1)
    accumulate: int = option(2, "batches per update; several processes share them", low=1)
    candidates: int = option(2048, "tokens that the soft-max of a batch runs over", low=16)
    ahead: int = option(4, "tokens predicted from each position", low=1, high=16)
    step_decay: float = option(
        0.7, "a predicted token weighs this much of the one before", low=0.0, high=1.0
    )
    lost: float = option(
        1.0,
        "weight of tokens after one that the head's own beams would have lost",
        low=0.0,
        high=1.0,
    )
