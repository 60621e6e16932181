"""The recurrent drafter: Apple's ReDrafter head (arXiv 2403.09919) and its checkpoint layout.

Shape letters: R rows (beams), h hidden size, e exit size, D draft vocabulary, V vocabulary,
W beam width, L beam length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx import device
from redrafter_mlx.budget import Budget
from redrafter_mlx.drafters.beam_search import beam_search, collect
from redrafter_mlx.drafters.drawn import draw, drawn_tree
from redrafter_mlx.drafters.lookback import SIZE, Lookback, Memory
from redrafter_mlx.round import Context, Step, Trail, Transcript
from redrafter_mlx.sampling import Noise, gumbel
from redrafter_mlx.tree import TokenTree


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
    def trail(self) -> slice | None:
        """What of the whole text's hidden states it needs."""
        return self.lookback_columns if self.lookback_heads else None

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


class RecurrentDrafter:
    """Drafts by beam search with a RecurrentHead.

    head    the weights
    d2t     (D,) the target's token id of each draft id
    embed   the target's embedding: ids (R,) -> (R, h)
    output  for a head with a tied output: token ids (D,) -> those rows of the target's own head,
            as a linear layer. The vocabulary then is d2t and whatever else the text holds.
    """

    def __init__(
        self,
        head: RecurrentHead,
        d2t: mx.array,
        embed: Callable[[mx.array], mx.array],
        output: Callable[[mx.array], nn.Module] | None = None,
    ):
        self.head, self.d2t, self.embed = head, d2t, embed
        self._vocabulary = TextVocabulary(d2t, head.config.vocab_size, output) if output else None
        self._memory = TextMemory(head, embed) if head.config.lookback_heads else None
        self._searches: dict[tuple, Callable] = {}

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        if context.noise is not None and not context.noise.coupled:
            return self._drawn(context, budget)
        shape = budget.width, budget.length, context.noise is not None
        if shape not in self._searches:
            self._searches[shape] = mx.compile(partial(self.search, *shape))
        noise = context.noise or Noise.silent()
        position = mx.array([context.position], dtype=mx.uint32)
        found = self._searches[shape](
            context.hidden,
            context.pending,
            position,
            noise.key,
            noise.temp,
            *self.vocabulary_of(context.transcript),
            self._memory_of(context),
        )
        root, *found = device.read(context.pending, *found)
        return budget.tree(collect(int(root[0]), *(array[0] for array in found)))

    def _drawn(self, context: Context, budget: Budget) -> TokenTree:
        """A tree of draws, for a rule that weighs them against what they were drawn from."""
        shape = budget.width, budget.length, "drawn"
        if shape not in self._searches:
            self._searches[shape] = mx.compile(partial(self.draw, budget.width, budget.length))
        d2t, rows = self.vocabulary_of(context.transcript)
        found = self._searches[shape](
            context.hidden,
            context.pending,
            mx.array([context.position], dtype=mx.uint32),
            context.noise.key,
            context.noise.temp,
            d2t,
            rows,
            self._memory_of(context),
        )
        root, ids, *found = device.read(context.pending, d2t, *found)
        return drawn_tree(int(root[0]), ids, *found, budget)

    def observe(self, step: Step) -> None:
        pass

    def reset(self) -> None:
        pass

    def vocabulary_of(self, transcript: Transcript) -> tuple[mx.array, dict]:
        """Token ids (D,) it can propose after a text, and the rows of a tied output for them."""
        return self._vocabulary.of(transcript) if self._vocabulary else (self.d2t, {})

    def _memory_of(self, context: Context) -> list[mx.array]:
        return self._memory.of(context.transcript, context.trail) if self._memory else []

    def logits(self, steps: Steps, state: State, rows: dict) -> mx.array:
        """(R, D) float32 of the vocabulary's tokens after R rows."""
        y = steps.logits(state)
        if self._vocabulary:
            y = self._vocabulary.project(y, rows)
        return y.astype(mx.float32)

    def search(
        self, width: int, length: int, coupled: bool,
        hidden, root, position, key, temp, d2t, rows, memory=(),
    ):  # fmt: skip
        """Beam search from each of P positions, as a function of arrays that can be compiled.

        hidden (P, c), root (P,) of each position; position (1,), key (2,), temp () of the noise
        that is reckoned with if `coupled`; d2t (D,) and rows, the vocabulary of a tied output;
        memory, the fields of a Memory for a head that looks back. Returns what `beam_search` does.

        Coupled: the target will add known noise to its logits at each position; adding the same
        noise to the head's logits ranks first what the target is likeliest to choose with it.
        """
        if coupled:
            positions = position + mx.arange(1, length, dtype=mx.uint32)[:, None]
            noise = temp * gumbel(key, positions, d2t.astype(mx.uint32)[None], mx)
        steps = self.head.steps(hidden, Memory(*memory) if memory else None)

        def score(state: State, depth: int) -> mx.array:
            logits = self.logits(steps, state, rows)
            if coupled:
                logits = logits + noise[depth - 1]
            return logits - device.softmax(logits)[0]

        return beam_search(
            advance=lambda state, tokens: steps.advance(state, self.embed(tokens)),
            score=score,
            token_ids=lambda ids: d2t[ids],
            root=root,
            width=min(width, d2t.size),
            length=length,
        )

    def draw(
        self, width: int, length: int, hidden, root, position, key, temp, d2t, rows, memory=()
    ):
        """What `drawn.draw` returns, as a function of arrays that can be compiled."""
        steps, state = self.head.steps(hidden, Memory(*memory) if memory else None), None

        def logits(last: mx.array | None) -> mx.array:
            nonlocal state
            state = steps.advance(state, self.embed(root if last is None else last))
            return self.logits(steps, state, rows)

        return draw(logits, d2t, key, temp, position, min(width, d2t.size), length)


class TextMemory:
    """The places that a head can look back at in one text, taken in as it grows.

    Buffers double, so that few sizes of them are compiled for.
    """

    ROOM = 512

    def __init__(self, head: RecurrentHead, embed: Callable[[mx.array], mx.array]):
        self._head, self._embed = head, embed
        self._transcript: Transcript | None = None

    def of(self, transcript: Transcript, trail: Trail) -> list[mx.array]:
        """The fields of a Memory of all places before the pending token."""
        if transcript is not self._transcript:
            self._transcript, self._places, self._before = transcript, 0, None
            self._keys, self._values = self._buffers(self.ROOM)
        new = trail.since(self._places)
        if new is not None:
            self._take_in(new)
        return [self._keys, self._values, mx.array([self._places])]

    def _take_in(self, hidden: mx.array) -> None:
        """Places of T tokens, whose next is known; hidden (T, h) is what the trail kept of them."""
        first, end = self._places, self._places + len(hidden)
        tokens = mx.array(self._transcript.tokens[first : end + 1])
        last = mx.zeros_like(hidden[:1]) if self._before is None else self._before
        before = mx.concatenate([last, hidden[:-1]])
        embedded = self._embed(tokens)[None]
        keys = self._head.lookback.keys(self._head.looked_at(before)[None], embedded[:, :-1])
        if end > self._values.shape[1]:
            room = self._values.shape[1]
            while room < end:
                room *= 2
            old = self._keys[..., :first], self._values[:, :first]
            self._keys, self._values = self._buffers(room)
            self._keys[..., :first], self._values[:, :first] = old
        self._keys[..., first:end], self._values[:, first:end] = keys, embedded[:, 1:]
        self._before, self._places = hidden[-1:], end

    def _buffers(self, room: int) -> tuple[mx.array, mx.array]:
        c = self._head.config
        dtype = self._head.lookback.key_token.weight.dtype
        if dtype == mx.uint32:  # quantised
            dtype = self._head.lookback.key_token.scales.dtype
        keys = mx.zeros((1, c.lookback_heads, c.lookback_size, room), dtype)
        return keys, mx.zeros((1, room, c.hidden_size), dtype)


class TextVocabulary:
    """The ids that a tied output proposes in one text: a static set and the ids of the text.

    static      (D,) token ids
    vocab_size  of the target
    output      token ids (D,) -> those rows of the target's head, as a linear layer

    Most of what a fixed set of some thousand ids misses in real answers stands in their prompts.
    Spare rows, filled with any other ids, keep shapes few; new ids of the text take their place,
    `BATCH` at a time, because each change copies the rows.
    """

    SPARE = 256
    BATCH = 16

    def __init__(self, static: mx.array, vocab_size: int, output: Callable[[mx.array], nn.Module]):
        self._static = np.array(static)
        self._vocab_size = vocab_size
        self._output = output
        self._transcript: Transcript | None = None

    def of(self, transcript: Transcript) -> tuple[mx.array, dict]:
        """Token ids (D',) and the parameters of the linear layer that scores them."""
        if transcript is not self._transcript:
            self._transcript, self._seen = transcript, 0
            self._ids, self._known = self._static, set(self._static.tolist())
            self._waiting: list[int] = []
        tokens = transcript.tokens
        for token in tokens[self._seen :]:
            if token not in self._known:
                self._known.add(token)
                self._waiting.append(token)
        if self._seen == 0 or len(self._waiting) >= self.BATCH:
            self._take_in()
        self._seen = len(tokens)
        return self._current

    def _take_in(self) -> None:
        self._ids = np.concatenate([self._ids, np.array(self._waiting, self._static.dtype)])
        self._waiting = []
        spare = -len(self._ids) % self.SPARE
        others = np.setdiff1d(np.arange(self._vocab_size), self._ids)[:spare]
        ids = mx.array(np.concatenate([self._ids, others]))
        self._linear = self._output(ids)
        if "scales" not in self._linear:
            self._linear.weight = device.by_columns(self._linear.weight)
        self._current = ids, self._linear.parameters()

    def project(self, features: mx.array, parameters: dict) -> mx.array:
        """Logits (R, D') of what the target's head would read (R, h)."""
        self._linear.update(parameters)
        return self._linear(features)
