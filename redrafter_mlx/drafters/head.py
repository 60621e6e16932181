"""The recurrent draft head: Apple's ReDrafter (arXiv 2403.09919), and extensions of it.

Shape letters: P positions drafted from, R rows (beams), h hidden size, c context size, e exit size,
D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.drafters.lookback import SIZE, Lookback, Memory
from redrafter_mlx.machine import device


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a head, as its config.json and tensor names give it.

    draft_vocab_size  how many token ids it can propose; d2t maps them to the target's
    num_blocks        residual blocks before the output layer
    tied_output       whether the output layer is made of rows of the target's own head
    fused_layers      layers of the target whose outputs it reads beside the final hidden state
    lookback_heads    attention heads to the text so far, of lookback_size each; 0 for none
    """

    vocab_size: int
    hidden_size: int
    exit_dim: int
    num_blocks: int
    rnn: bool
    draft_vocab_size: int
    tied_output: bool = False
    fused_layers: tuple[int, ...] = ()
    lookback_heads: int = 0
    lookback_size: int = SIZE

    @property
    def context_size(self) -> int:
        """Width of what it reads of the target: hidden state, then the fused layers."""
        return self.hidden_size * (1 + len(self.fused_layers))

    @property
    def lookback_columns(self) -> slice:
        """Of that, what a lookback reads of each place: the first fused layer, or the final state.

        One layer, because it is read for the whole text.
        """
        first = self.hidden_size if self.fused_layers else 0
        return slice(first, first + self.hidden_size)

    @property
    def has_projection(self) -> bool:
        return self.exit_dim != self.context_size + self.hidden_size


class ResidualBlock(nn.Module):
    """y + SiLU(linear(y))."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def __call__(self, y: mx.array) -> mx.array:
        return y + device.silu(self.linear(y))


class RecurrentHead(nn.Module):
    """Predicts the next tokens from one hidden state of the target and the tokens after it.

    Parameter names are those of the reference implementation's checkpoints.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        h, e = config.hidden_size, config.exit_dim
        if config.has_projection:
            self.input_proj = nn.Linear(config.context_size + h, e)
        self.lm_head = [ResidualBlock(e) for _ in range(config.num_blocks)]
        if not config.tied_output:
            self.lm_head.append(nn.Linear(e, config.draft_vocab_size, bias=False))
        if config.rnn:
            self.rnn_u = nn.Linear(h, h)
            self.rnn_w = nn.Linear(h, h, bias=False)
        if config.lookback_heads:
            self.lookback = Lookback(h, e, config.lookback_heads, config.lookback_size)

    def steps(self, hidden: mx.array, memory: Memory | None = None) -> Steps:
        """Its steps from P positions; hidden as of `read`, memory if it looks back."""
        return Steps(self, hidden, memory)

    def advance(self, state: mx.array | None, embedding: mx.array) -> mx.array:
        """State (R, h) after reading token embeddings (R, h); the state before the root is zero."""
        if "rnn_w" not in self:
            return embedding if state is None else state + embedding
        if state is None:
            state = mx.zeros_like(embedding)
        return device.silu(self.rnn_w(embedding) + self.rnn_u(state))

    def read(self, hidden: mx.array) -> mx.array:
        """What every step from a position needs of the target there (P, c) or, projected, (P, e).

        hidden  (P, at least c) final hidden states, then the outputs of the fused layers
        """
        context = self.normed(hidden)
        if not self._projects_in_halves:
            return context
        return self._projected(context, 0) + self.input_proj.bias

    def normed(self, hidden: mx.array) -> mx.array:
        """The context (..., c): the fused layers at the scale of the final state, which is normed.

        Layers differ by orders of magnitude.
        """
        parts = 1 + len(self.config.fused_layers)
        final, *fused = mx.split(hidden[..., : self.config.context_size], parts, axis=-1)
        return mx.concatenate([final, *map(_rms_normed, fused)], axis=-1)

    def looked_at(self, hidden: mx.array) -> mx.array:
        """What a lookback reads (..., h), normed, of the `lookback_columns` of hidden states."""
        return _rms_normed(hidden) if self.config.fused_layers else hidden

    def __call__(self, read: mx.array, state: mx.array) -> mx.array:
        """Logits (R, D) of the token after the last one read; (R, e) for a tied output.

        read   of P positions, from `read`
        state  (R, h), as many rows for each position
        """
        return self._output(self.features(read, state))

    def features(self, read: mx.array, state: mx.array, heard: mx.array | None = None) -> mx.array:
        """What the output layer reads (R, e); heard (R, e) by a lookback, else as of a call."""
        read = mx.repeat(read, len(state) // len(read), axis=0)
        if self._projects_in_halves:
            y = read + self._projected(state, self.config.context_size)
        else:
            y = mx.concatenate([read, state], axis=-1)
            y = self.input_proj(y) if "input_proj" in self else y
        return self._through_blocks(y if heard is None else y + heard)

    def exit(self, x: mx.array) -> mx.array:
        """Logits (R, D) of context and state side by side (R, c + h): the reference's own form."""
        return self._output(self._through_blocks(self.input_proj(x) if "input_proj" in self else x))

    def _through_blocks(self, y: mx.array) -> mx.array:
        for block in self.lm_head[: self.config.num_blocks]:
            y = block(y)
        return y

    def _output(self, y: mx.array) -> mx.array:
        return y if self.config.tied_output else self.lm_head[-1](y)

    @property
    def _projects_in_halves(self) -> bool:
        """Whether the context's half of the projection can be taken out of the steps."""
        if "input_proj" not in self:
            return False
        return self.config.context_size % getattr(self.input_proj, "group_size", 1) == 0

    def _projected(self, x: mx.array, first: int) -> mx.array:
        """`x` (R, k) through the k columns of the projection from `first` on, without bias."""
        layer, last = self.input_proj, first + x.shape[-1]
        if "scales" not in layer:
            return x @ layer.weight[:, first:last].T
        group, packed = layer.group_size, 32 // layer.bits
        groups = slice(first // group, last // group)
        return mx.quantized_matmul(
            x,
            layer.weight[:, first // packed : last // packed],
            layer.scales[:, groups],
            layer.biases[:, groups],
            group_size=group,
            bits=layer.bits,
        )


def _rms_normed(x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, 1e-6)


@dataclass(frozen=True)
class State:
    """Where R rows of a draft stand: recurrent (R, h), and likeness (R, H, S) of a lookback."""

    recurrent: mx.array
    likeness: mx.array | None = None

    def __len__(self) -> int:
        return len(self.recurrent)

    def __getitem__(self, rows: mx.array) -> State:
        likeness = None if self.likeness is None else self.likeness[rows]
        return State(self.recurrent[rows], likeness)


class Steps:
    """A head's steps from P positions: reading tokens, and predicting what follows."""

    def __init__(self, head: RecurrentHead, hidden: mx.array, memory: Memory | None):
        self._head, self._read = head, head.read(hidden)
        self._memory = memory if head.config.lookback_heads else None
        if self._memory is not None:
            here = head.looked_at(hidden[..., head.config.lookback_columns])
            self._asked = head.lookback.asked(here)

    def advance(self, state: State | None, embedding: mx.array) -> State:
        """After reading token embeddings (R, h); the first step has no state before it."""
        recurrent = self._head.advance(state and state.recurrent, embedding)
        if self._memory is None:
            return State(recurrent)
        before = state and state.likeness
        return State(
            recurrent,
            self._head.lookback.likeness(self._asked, embedding, recurrent, self._memory, before),
        )

    def features(self, state: State) -> mx.array:
        """What the output layer reads (R, e)."""
        heard = None
        if self._memory is not None:
            heard = self._head.lookback(state.likeness, self._memory)
        return self._head.features(self._read, state.recurrent, heard)

    def logits(self, state: State) -> mx.array:
        """(R, D) of the token after the last one read; (R, e) for a tied output."""
        return self._head._output(self.features(state))
