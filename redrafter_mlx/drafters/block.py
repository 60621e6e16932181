"""Heads that fill in a block of tokens at once: DFlash (arXiv 2602.06036), DFlash 2 and DSpark.

A block is the pending token and mask tokens after it. Its rows attend to each other and to the
context: keys and values that every layer makes of what was captured of the target, one place for
each token that the target has processed. Rows of a block never enter the context, so whatever was
accepted, it is that of a fresh start on the same text.

A block is always as long as those that the head was trained with. Its rows see those after them,
so a shorter one would predict something else.

Shape letters: P positions drafted from, B rows of a block, T tokens, S places of the buffers,
h hidden size, R rows, D draft vocabulary, r rank, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.rope_utils import initialize_rope

from redrafter_mlx.drafters.attention import CHUNK, DraftKeys, TextKeys, TextLayers, memory_of
from redrafter_mlx.drafters.beam_search import top_k
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import Trail, Transcript, View
from redrafter_mlx.target.rope import accept_row_offsets


@dataclass(frozen=True)
class Sight:
    """What the rows of one layer see; window: how many places, their own included; None: all."""

    window: int | None = None
    causal: bool = False


@dataclass(frozen=True)
class BlockConfig:
    """The shape of a head.

    layer            mlx-lm's ModelArgs of its layers
    sights           of each layer
    reads            layers of the target whose outputs it reads
    block_size       B
    next_token       whether a row predicts the token after it, as DSpark's do, instead of its own
    biased           whether the projections of its attention have biases
    interleaved      whether positions rotate neighbouring columns together, instead of distant ones
    conv_taps        rows that a convolution reaches; 0: there is none
    conv_group       columns that share its weights
    candidates       of a Selector; 0: there is none
    markov           kind of Markov head; None: there is none
    rank             of the Selector or the Markov head
    """

    layer: qwen3.ModelArgs
    sights: tuple[Sight, ...]
    reads: tuple[int, ...]
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    mask_token_id: int
    next_token: bool = False
    biased: bool = False
    interleaved: bool = False
    conv_taps: int = 0
    conv_group: int = 1
    candidates: int = 0
    markov: str | None = None
    rank: int = 0
    embedding_scale: float = 1.0
    multiplier: float = 1.0
    cap: float | None = None

    @property
    def depths(self) -> int:
        """How many tokens a block predicts."""
        return self.block_size - (not self.next_token)


class Attention(qwen3.Attention):
    """Attention of the rows of blocks to their context and to each other."""

    def __init__(self, config: BlockConfig):
        super().__init__(config.layer)
        if config.biased:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                rows, columns = self[name].weight.shape
                self[name] = nn.Linear(columns, rows)
        if config.interleaved:
            args = config.layer
            self.rope = initialize_rope(
                args.head_dim, args.rope_theta, True, args.rope_scaling,
                args.max_position_embeddings,
            )  # fmt: skip
        accept_row_offsets(self.rope)

    def __call__(self, x: mx.array, mask: mx.array, text: DraftKeys) -> mx.array:
        """(P, B, h) of blocks (P, B, h), whose rows all follow the text as one sequence."""
        return super().__call__(x.reshape(1, -1, x.shape[-1]), mask, text).reshape(x.shape)

    def take_in(self, context: mx.array, text: TextKeys) -> None:
        """Keep keys and values of T further places of a text (1, T, h)."""
        split = lambda y: y.reshape(1, context.shape[1], self.n_kv_heads, -1)
        keys = self.k_norm(split(self.k_proj(context))).transpose(0, 2, 1, 3)
        values = split(self.v_proj(context)).transpose(0, 2, 1, 3)
        text.update_and_fetch(self.rope(keys, offset=text.offset), values)


class Convolution(nn.Module):
    """Convolutions over the rows of a block, before and after a sublayer.

    Their weights are fixed ones plus, for each row and group of columns, some computed from the row
    before the sublayer.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        h, self._shape = config.layer.hidden_size, (2, config.conv_taps, -1, 1)
        groups = h // config.conv_group
        self.base_kernel = mx.zeros((2, config.conv_taps, h))
        self.kernel_projection = nn.Linear(h, 2 * config.conv_taps * groups, bias=False)

    def around(self, sublayer: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        asked = self.kernel_projection(x).reshape(*x.shape[:2], *self._shape)
        fixed = self.base_kernel.reshape(*self._shape[:2], asked.shape[4], -1)
        kernels = fixed + asked  # (P, B, 2, taps, groups, columns of each)
        return convolve(sublayer(convolve(x, kernels[:, :, 0])), kernels[:, :, 1])


def convolve(x: mx.array, kernels: mx.array) -> mx.array:
    """(P, B, h) sums of each row (P, B, h) and those before it in its block, each by its weights.

    kernels  (P, B, taps, groups, columns of each): how much of itself, of the row before, ...
    """
    rows, taps = kernels.shape[1:3]
    grouped = x.reshape(*x.shape[:2], *kernels.shape[3:])
    padded = mx.pad(grouped, [(0, 0), (taps - 1, 0), (0, 0), (0, 0)])
    shifted = (padded[:, taps - 1 - tap :][:, :rows] for tap in range(taps))
    return sum(kernels[:, :, tap] * each for tap, each in enumerate(shifted)).reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        h, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = qwen3.MLP(h, config.layer.intermediate_size)
        self.input_layernorm = nn.RMSNorm(h, eps)
        self.post_attention_layernorm = nn.RMSNorm(h, eps)
        if config.conv_taps:
            self.attention_conv, self.mlp_conv = Convolution(config), Convolution(config)

    def __call__(self, x: mx.array, mask: mx.array, text: DraftKeys) -> mx.array:
        around = lambda name, f, y: self[name].around(f, y) if name in self else f(y)
        attend = lambda y: self.self_attn(y, mask, text)
        x = x + around("attention_conv", attend, self.input_layernorm(x))
        return x + around("mlp_conv", self.mlp, self.post_attention_layernorm(x))


class Selector(nn.Module):
    """DFlash 2's link between neighbours: scores the likeliest tokens of a place by the one before.

    Other tokens are no candidates: the head was trained to choose among these.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.predecessor_codebook = mx.zeros((config.vocab_size, config.rank))
        self.successor_codebook = mx.zeros((config.draft_vocab_size, config.rank))
        self.hidden_projection = nn.Linear(config.layer.hidden_size, config.rank, bias=False)
        self._candidates = config.candidates

    def read(self, hidden: mx.array, tokens: mx.array, memory: None) -> tuple[mx.array, None]:
        """(R, r) what a place's scores are made of, from its hidden state and the token before."""
        return self.predecessor_codebook[tokens] * self.hidden_projection(hidden), None

    def scores(self, logits: mx.array, origins: mx.array, read: mx.array) -> mx.array:
        """(R, D) of logits (P, D) at the places that R rows stem from, and what these have read."""
        candidates, own = top_k(logits, self._candidates)
        candidates = candidates[origins]
        pairs = (self.successor_codebook[candidates] * read[:, None]).sum(axis=-1)
        others = mx.full((len(origins), logits.shape[-1]), -mx.inf)
        return mx.put_along_axis(others, candidates, own[origins] + pairs, axis=-1)


class MarkovHead(nn.Module):
    """DSpark's link between neighbours: a bias of all logits by the token before.

    vanilla  by that token alone
    gated    and by the hidden state of the place
    rnn      and by the tokens before it, in a state of its own
    """

    KINDS = ("vanilla", "gated", "rnn")

    def __init__(self, config: BlockConfig):
        super().__init__()
        rank, h = config.rank, config.layer.hidden_size
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if config.markov == "gated":
            self.gate_proj = nn.Linear(h + rank, rank)
        if config.markov == "rnn":
            self.joint_proj = nn.Linear(2 * rank + h, 3 * rank)

    def read(
        self, hidden: mx.array, tokens: mx.array, memory: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """(R, r) what a place's bias is made of, and (R, r) the state of an rnn after it."""
        token = self.markov_w1(tokens)
        if "gate_proj" in self:
            gate = mx.sigmoid(self.gate_proj(mx.concatenate([hidden, token], axis=-1)))
            return gate * token, None
        if "joint_proj" not in self:
            return token, None
        memory = mx.zeros_like(token) if memory is None else memory
        joint = self.joint_proj(mx.concatenate([memory, token, hidden], axis=-1))
        gate, new, out = mx.split(joint, 3, axis=-1)
        kept = mx.sigmoid(gate)
        return mx.tanh(out), kept * memory + (1 - kept) * mx.tanh(new)

    def scores(self, logits: mx.array, origins: mx.array, read: mx.array) -> mx.array:
        """(R, D) of logits (P, D) at the places that R rows stem from, and what these have read."""
        return logits[origins] + self.markov_w2(read)


class BlockHead(nn.Module):
    """The layers; `candidate_selector` or `markov_head` where neighbours are linked."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config, h, eps = config, config.layer.hidden_size, config.layer.rms_norm_eps
        self.fc = nn.Linear(len(config.reads) * h, h, bias=False)
        self.hidden_norm, self.norm = nn.RMSNorm(h, eps), nn.RMSNorm(h, eps)
        self.layers = [Layer(config) for _ in config.sights]
        if config.candidates:
            self.candidate_selector = Selector(config)
        if config.markov:
            self.markov_head = MarkovHead(config)

    @property
    def link(self) -> Selector | MarkovHead | None:
        return self.get("candidate_selector", self.get("markov_head"))

    def take_in(self, captured: mx.array, texts: Sequence[TextKeys]) -> None:
        """Keep T further places of a text in each layer's keys; captured (T, c) of the target."""
        context = self.hidden_norm(self.fc(captured))[None]
        for layer, text in zip(self.layers, texts, strict=True):
            layer.self_attn.take_in(context, text)

    def __call__(self, embedded: mx.array, memory: Sequence[mx.array]) -> mx.array:
        """(P, B, h) hidden states of blocks (P, B, h); memory as of a BlockText."""
        *arrays, visible = memory
        size = embedded.shape[1]
        positions = (visible[:, None] + mx.arange(size)).reshape(-1)
        sees = seen(visible, size, arrays[0].shape[2])
        masks = {sight: sees(sight) for sight in set(self.config.sights)}
        x = embedded
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        for layer, sight, pair in zip(self.layers, self.config.sights, pairs, strict=True):
            text = DraftKeys(*pair)
            text.offset = positions
            x = layer(x, masks[sight], text)
        return self.norm(x)


def seen(visible: mx.array, size: int, places: int) -> Callable[[Sight], mx.array]:
    """A Sight's mask (P·B, S + P·B) of the rows of blocks, each after `visible` (P,) places."""
    block = mx.repeat(mx.arange(len(visible)), size)
    rows = (visible[:, None] + mx.arange(size)).reshape(-1)
    text = mx.arange(places)
    columns = mx.concatenate([text, rows])
    its_own = block[:, None] == block
    before = text < mx.repeat(visible, size)[:, None]
    all_places = mx.concatenate([before, its_own], axis=1)

    def mask(sight: Sight) -> mx.array:
        found = all_places
        if sight.window is not None:
            found = found & (rows[:, None] - columns < sight.window)
        return found & (columns <= rows[:, None]) if sight.causal else found

    return mask


class BlockText(TextLayers):
    """The context in one text, taken in as the target processes the text."""

    def __init__(self, head: BlockHead, view: View):
        super().__init__()
        self._head, self._view = head, view

    def of(self, transcript: Transcript, trail: Trail) -> list[mx.array]:
        """The memory of a Begun after all processed tokens."""
        _, captured = self.new(transcript, trail)
        if captured is not None:
            self._take_in(captured)
        return self.memory

    def catch_up(self) -> None:
        self.of(self._transcript, self._trail)

    def of_whole(self, captured: mx.array, first: int) -> list[mx.array]:
        """That of each token from the `first` on, of a text whose states (T - 1, C) are known."""
        self.restart()
        self._take_in(captured)
        return memory_of(self._layers, mx.arange(first, len(captured) + 1))

    def _take_in(self, captured: mx.array) -> None:
        """A chunk at a time; the last one is computed only when it is needed."""
        for start in range(0, len(captured), CHUNK):
            if start:
                device.finish([(layer.keys, layer.values) for layer in self._layers])
            self._head.take_in(self._view(captured[start : start + CHUNK]), self._layers)

    def restart(self) -> None:
        """Buffers of zeros, of the shapes and the type that places of a text will have."""
        args, places = self._head.config.layer, self._head.fc
        dtype = places.scales.dtype if "scales" in places else places.weight.dtype
        shape = 1, args.num_key_value_heads, CHUNK, args.head_dim
        self._layers = [TextKeys() for _ in self._head.layers]
        for layer in self._layers:
            layer.keys, layer.values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)
