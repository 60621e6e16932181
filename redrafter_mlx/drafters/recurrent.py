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

from redrafter_mlx import device
from redrafter_mlx.budget import Budget
from redrafter_mlx.drafters.beam_search import beam_search, collect
from redrafter_mlx.round import Context, Step
from redrafter_mlx.sampling import Noise, gumbel
from redrafter_mlx.tree import TokenTree


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a head, as its config.json and tensor names give it.

    draft_vocab_size  how many token ids it can propose; d2t maps them to the target's
    num_blocks        residual blocks before the output layer
    """

    vocab_size: int
    hidden_size: int
    exit_dim: int
    num_blocks: int
    rnn: bool
    draft_vocab_size: int


class ResidualBlock(nn.Module):
    """y + SiLU(linear(y))."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def __call__(self, y: mx.array) -> mx.array:
        return y + nn.silu(self.linear(y))


class RecurrentHead(nn.Module):
    """Predicts the next tokens from one hidden state of the target and the tokens after it.

    Parameter names are those of the reference implementation's checkpoints.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        h, e = config.hidden_size, config.exit_dim
        if e != 2 * h:
            self.input_proj = nn.Linear(2 * h, e)
        self.lm_head = [ResidualBlock(e) for _ in range(config.num_blocks)]
        self.lm_head.append(nn.Linear(e, config.draft_vocab_size, bias=False))
        if config.rnn:
            self.rnn_u = nn.Linear(h, h)
            self.rnn_w = nn.Linear(h, h, bias=False)

    def advance(self, state: mx.array | None, embedding: mx.array) -> mx.array:
        """State (R, h) after reading token embeddings (R, h); the state before the root is zero."""
        if "rnn_w" not in self:
            return embedding if state is None else state + embedding
        if state is None:
            state = mx.zeros_like(embedding)
        return nn.silu(self.rnn_w(embedding) + self.rnn_u(state))

    def __call__(self, context: mx.array, state: mx.array) -> mx.array:
        """Logits (R, D) of the token after the last one read.

        context  (1 or R, h) the target's hidden state at its last verified token
        state    (R, h)
        """
        return self.exit(mx.concatenate([mx.broadcast_to(context, state.shape), state], axis=-1))

    def exit(self, x: mx.array) -> mx.array:
        """Logits (R, D) of context and state side by side (R, 2h)."""
        y = self.input_proj(x) if "input_proj" in self else x
        for layer in self.lm_head:
            y = layer(y)
        return y


class RecurrentDrafter:
    """Drafts by beam search with a RecurrentHead.

    head   the weights
    d2t    (D,) the target's token id of each draft id
    embed  the target's embedding: ids (R,) -> (R, h)
    """

    def __init__(self, head: RecurrentHead, d2t: mx.array, embed: Callable[[mx.array], mx.array]):
        self.head, self.d2t, self._embed = head, d2t, embed
        self._searches: dict[tuple[int, int, bool], Callable] = {}

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        shape = budget.width, budget.length, context.noise is not None
        if shape not in self._searches:
            self._searches[shape] = mx.compile(partial(self._search, *shape))
        noise = context.noise or Noise.silent()
        position = mx.array([context.position], dtype=mx.uint32)
        found = self._searches[shape](
            context.hidden, context.pending, position, noise.key, noise.temp
        )
        root, *found = device.read(context.pending, *found)
        return budget.tree(collect(int(root[0]), *found))

    def observe(self, step: Step) -> None:
        pass

    def reset(self) -> None:
        pass

    def _search(self, width: int, length: int, coupled: bool, hidden, root, position, key, temp):
        """Beam search as one compiled function of arrays.

        Coupled: the target will add known noise to its logits at each position; adding the same
        noise to the head's logits ranks first what the target is likeliest to choose with it.
        """
        if coupled:
            positions = position + mx.arange(1, length, dtype=mx.uint32)[:, None]
            noise = temp * gumbel(key, positions, self.d2t.astype(mx.uint32)[None], mx)

        def score(state: mx.array, depth: int) -> mx.array:
            logits = self.head(hidden, state).astype(mx.float32)
            if coupled:
                logits = logits + noise[depth - 1]
            return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

        return beam_search(
            advance=lambda state, tokens: self.head.advance(state, self._embed(tokens)),
            score=score,
            token_ids=lambda ids: self.d2t[ids],
            root=root,
            width=min(width, self.d2t.size),
            length=length,
        )
