"""Makes an mlx-lm model answer prefill, verify and commit.

Shape letters: N nodes, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.rounds.round import Context, Outcome, Trail, Transcript, Verdict, View
from redrafter_mlx.rounds.sampling import Noise
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target import exchange, hooks, parallel
from redrafter_mlx.target.cache import Branches, Quantization, TreeCache
from redrafter_mlx.target.caches import CacheGroup, LayerCaches
from redrafter_mlx.target.probe import Parity, parity_of, probe_parity
from redrafter_mlx.target.rope import accept_row_offsets, accept_row_scales, takes_offset
from redrafter_mlx.target.state import StateCache, forward_pass
from redrafter_mlx.target.tape import recording

STEPS_BACK = 4
"""Passes that a run may be ahead of the tokens it has handed on."""


class Target:
    """An mlx-lm model whose next tokens are verified in trees.

    model      any mlx-lm model; what computes its positions and recurrences is changed so that it
               also works along the paths of a tree
    branching  whether trees will be verified; without it any model works, one token at a time
    parity     how exactly a tree's logits are those of its paths; None without branching, and in
               processes that follow another one

    Raises UserError with the reason when the model cannot verify a tree.
    """

    def __init__(self, model: nn.Module, branching: bool = True):
        self.model = model
        self.branching = branching
        self.taps: tuple[int, ...] = ()
        self.readers = 0  # drafters that read the hidden states of the whole text
        self.parity: Parity | None = None
        self._head: nn.Module | None = None
        self._last: nn.Module | None = None  # whose output a head that is no module reads
        self.hidden_size, self.dtype = 0, mx.float32  # hidden states are for drafters only
        if branching:
            self._find_ends()
            for module in filter(takes_offset, model.modules()):
                accept_row_offsets(module)
            accept_row_scales(model)
            hooks.install(model)
            if not parallel.is_follower():
                self.parity = probe_parity(self) if parallel.leader() else parity_of(self)

    def _find_ends(self) -> None:
        """Trace one token (nothing is evaluated) to find the embedding and the head."""
        try:
            with recording(self.model.modules()) as tape:
                logits = self.model(mx.array([[0]]), cache=make_prompt_cache(self.model))
            self.vocab_size = logits.shape[-1]
        except Exception as error:  # whatever a model file raises
            raise UserError(
                f"{self.name} cannot be a target: it fails on one token with mlx-lm's own cache: "
                f"{type(error).__name__}: {one_line(error)}; update mlx-lm or take another model"
            ) from error
        heads = [call for call in tape.linear if call.width == self.vocab_size]
        read = None
        if heads:
            self._head, read = heads[-1].module, heads[-1].given
        elif tape.embedding is not None:
            read = self._find_bare_head()
        if read is None:
            missing = "head" if tape.embedding else "embedding"
            raise UserError(
                f"{self.name} cannot be a target: its {missing} is not a Linear or Embedding "
                "module, so what a drafter needs of it cannot be captured; generate with --no-draft"
            )
        self.hidden_size, self.dtype = read.shape[-1], read.dtype
        self.embed: Callable[[mx.array], mx.array] = tape.embedding

    def _find_bare_head(self) -> mx.array | None:
        """What the head reads for one token, if the head is a product with a bare matrix (V, E).

        That is the last output of a module whose product with one of the model's matrices gives the
        logits, up to their scale.
        """
        inner = [module for module in self.model.modules() if module is not self.model]
        with recording([], [module for module in inner if callable(module)]) as tape:
            logits = self.model(mx.array([[0]]), cache=make_prompt_cache(self.model))
        matrices = [
            weight
            for _, weight in tree_flatten(self.model.parameters())
            if weight.ndim == 2 and len(weight) == self.vocab_size
        ]
        for module, output in reversed(tape.layers):
            for weight in matrices:
                if output.shape[-1] == weight.shape[-1] and _aligned(output @ weight.T, logits):
                    self._last, self._head = module, nn.Module()
                    self._head.weight = weight
                    return output
        return None

    @property
    def name(self) -> str:
        """The model type, for messages."""
        return getattr(self.model, "model_type", None) or type(self.model).__module__

    def empty_caches(
        self, quantization: Quantization | None = None, steps_back: int = 0
    ) -> LayerCaches:
        """Caches for a new text; UserError if one of the model's layers cannot branch.

        steps_back  latest passes that recurrent layers can take back after their commit
        """
        caches = make_prompt_cache(self.model)
        if self.branching:
            for layer, cache in enumerate(caches):
                refusal = f"{self.name} cannot verify a tree: layer {layer}"
                caches[layer] = _tree_cache(cache, refusal, quantization, steps_back)
        if parallel.leader():
            return parallel.LedCaches(caches, quantization, steps_back)
        return LayerCaches(caches, quantization)

    def caches_after(
        self, prompt_cache: list, quantization: Quantization | None = None
    ) -> LayerCaches:
        """Caches that continue mlx-lm's; UserError if these are not of this model."""
        if parallel.leader():
            raise UserError("a prompt cache cannot be shared by several processes: leave it out")
        if not self.branching:
            caches = LayerCaches(prompt_cache, quantization)
            caches.begin_at(exchange.length_of(prompt_cache))
            return caches
        caches = self.empty_caches(quantization, STEPS_BACK)
        exchange.take_over(caches, prompt_cache)
        return caches

    def hand_back(
        self, caches: LayerCaches, prompt_cache: list, begun: int, tokens: Sequence[int], chunk: int
    ) -> None:
        """Put into mlx-lm's caches, in place, exactly what they held before and `tokens`.

        begun  tokens that they held before
        """
        if self.branching:
            caches.rewind(caches.restorable(begun + len(tokens)))
        self.read(tokens[caches.length - begun :], caches, chunk)
        if self.branching:
            exchange.hand_back(caches, prompt_cache)
        else:
            prompt_cache[:] = caches.layers

    def prefill(
        self,
        tokens: Sequence[int],
        chunk: int,
        noise: Noise | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        caches: LayerCaches | None = None,
    ) -> Context:
        """Process all prompt tokens but the last, which becomes the pending token.

        caches  of the text that the tokens follow; empty ones by default

        The head's logits are never evaluated here. `progress(done, total)` counts prompt tokens.
        """
        caches = self.empty_caches() if caches is None else caches
        steps = self.prefill_by_chunks(tokens, chunk, noise, caches)
        while True:
            try:
                progress(next(steps), len(tokens))
            except StopIteration as end:
                return end.value

    def prefill_by_chunks(
        self,
        tokens: Sequence[int],
        chunk: int,
        noise: Noise | None,
        caches: LayerCaches,
        begun: int = 0,
        marks: Collection[int] = (),
        readers: int | None = None,
    ) -> Generator[int, None, Context]:
        """`prefill`, which yields the number of tokens processed after each chunk, 0 before them.

        begun    how many of `tokens` the caches hold already
        marks    positions whose state the caches are to remember
        readers  how many drafters will read the hidden states of the whole text; by default all
                 that have asked for them

        Chunks end at multiples of their size, wherever the work begins, and at marks if the caches
        cannot go back to every position by themselves.
        """
        readers = self.readers if readers is None else readers
        trail = Trail(readers, begun) if readers else None
        marks = () if caches.can_be_cut else marks
        last = len(tokens) - 1
        yield begun
        hidden, place = self._nothing(), begun
        for end in _ends(begun, last, chunk, marks):
            hidden = self.read(tokens[place:end], caches, end - place, trail=trail)
            place = end
            if end in marks:
                caches.remember()
            yield end
        device.finish(hidden)
        pending, transcript = mx.array(tokens[last:]), Transcript(tokens)
        return Context(pending, hidden, caches.length, transcript, caches, noise, trail)

    def _nothing(self) -> mx.array:
        return mx.zeros((1, self.hidden_size * (1 + len(self.taps))), self.dtype)

    def read(
        self,
        tokens: Sequence[int],
        caches: LayerCaches,
        chunk: int,
        trail: Trail | None = None,
    ) -> mx.array:
        """Add tokens to the caches; (1, C) the hidden state at the last one, or zeros.

        trail  gets the hidden states of all

        The hidden state is not evaluated here: what follows the last layer's attention is in no
        cache, and only that of a prompt's last chunk is needed.
        """
        hidden = self._nothing()
        for start in range(0, len(tokens), chunk):
            ids = mx.array(tokens[start : start + chunk])
            caches.begin(len(ids), certain=True)
            states = self.forward(ids[None], caches).hidden[0]
            hidden = states[-1:]
            kept = [] if trail is None else trail.add(states)
            caches.commit(range(len(ids)))
            device.finish(caches.state, kept)
            mx.clear_cache()
        return hidden

    def takes(self, context: Context, tree: TokenTree) -> bool:
        """Whether the tree's rows would find the caches as rows decoded one by one would."""
        return context.caches.takes(context.position, int(tree.depths.max()))

    def verify(self, context: Context, tree: TokenTree) -> Outcome:
        """One forward pass over all N nodes, the root at the pending token's position."""
        branches = None if tree.is_chain else Branches(tree, context.position)
        context.caches.begin(len(tree), branches)
        ids = context.pending
        if len(tree) > 1:
            ids = mx.concatenate([ids, mx.array(tree.tokens[1:], dtype=ids.dtype)])
        outcome = self.forward(ids[None], context.caches)
        return Outcome(outcome.logits[0], outcome.hidden[0])

    def commit(
        self, context: Context, tree: TokenTree, outcome: Outcome, verdict: Verdict
    ) -> Context:
        """Keep the verdict's path in the KV cache; the Context after it."""
        path = list(verdict.path)
        context.caches.commit(path)
        pending = verdict.pending if verdict.token is None else verdict.token
        context.transcript.extend(tree.tokens[path[1:]].tolist(), pending)
        if context.trail is not None:
            context.trail.add(outcome.hidden[mx.array(path)])
        return replace(
            context,
            pending=verdict.pending,
            hidden=outcome.hidden[path[-1] : path[-1] + 1],
            position=context.position + len(path),
        )

    def tap(self, layers: Sequence[int], final: bool = True, whole_text: bool = False) -> View:
        """Capture the outputs of these layers, too; the View with which a drafter reads them.

        final       whether the final hidden state is read before them
        whole_text  whether they are read for every token, from a Trail

        Raises UserError if there is no such layer.
        """
        count = len(self.model.layers)
        if any(not 0 <= layer < count for layer in layers):
            raise UserError(
                f"a drafter reads layers {list(layers)}: {self.name} has {count} layers"
            )
        self.taps += tuple(layer for layer in dict.fromkeys(layers) if layer not in self.taps)
        self.readers += whole_text
        parts = tuple(1 + self.taps.index(layer) for layer in layers)
        return View((0, *parts) if final else parts, self.hidden_size)

    def output_layer(self, ids: mx.array) -> nn.Module:
        """The rows `ids` (D,) of the model's own head, quantised or not, as a linear layer.

        Its logits lack what a model may do to them afterwards, such as a soft cap.
        """
        head = self._head
        if "scales" in head:
            width = head.bits * head.group_size
            layer = nn.QuantizedLinear(
                width, 1, "bias" in head, head.group_size, head.bits, head.mode
            )
        else:
            layer = nn.Linear(1, 1, "bias" in head)
        for name in ("weight", "scales", "biases", "bias"):
            if name in head:
                layer[name] = head[name][ids]
        return layer

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., V) of the model's own head, as `output_layer` has it, after (..., E)."""
        head = self._head
        if hasattr(head, "as_linear"):
            return head.as_linear(hidden)
        return head(hidden) if callable(head) else hidden @ head.weight.T

    def forward(self, ids: mx.array, caches: LayerCaches) -> Outcome:
        """The model's own forward pass over token ids (B, N), after what the caches hold.

        Returns logits (B, N, V), not evaluated yet, and hidden states (B, N, E): the final norm's
        output, and beside it the outputs of the layers in `taps`.
        """
        heard = [self.model.layers[layer] for layer in self.taps]
        last = [] if self._last is None else [self._last]
        if isinstance(caches, parallel.LedCaches):
            ids = parallel.leader().forward(caches.number, ids)
        watched = [] if self._head is None else [self._head]
        with forward_pass(caches.lineage), recording(watched, [*heard, *last]) as tape:
            logits = self.model(ids, cache=caches.layers)
        outputs = {id(module): output for module, output in tape.layers}
        hidden = mx.zeros((*ids.shape, 0))
        if tape.linear:
            hidden = tape.linear[-1].given
        elif last:
            hidden = outputs[id(self._last)]
        if heard:
            hidden = mx.concatenate([hidden, *(outputs[id(layer)] for layer in heard)], axis=-1)
        if isinstance(caches, parallel.LedCaches):
            parallel.leader().ran(hidden)
        return Outcome(logits, hidden)


def _aligned(a: mx.array, b: mx.array) -> bool:
    """Whether two vectors point the same way."""
    a, b = a.astype(mx.float32).flatten(), b.astype(mx.float32).flatten()
    (cosine,) = device.read(a @ b / mx.maximum(mx.linalg.norm(a) * mx.linalg.norm(b), 1e-9))
    return bool(cosine > 0.999)


def adapt(model: nn.Module, branching: bool = True) -> Target:
    """The model's Target, made (and probed) once and kept with the model."""
    branching = branching or parallel.leader() is not None  # followers have branching caches
    target = getattr(model, "_redrafter_target", None)
    if target is None or (branching and not target.branching):
        target = model._redrafter_target = Target(model, branching)
    return target


def _ends(first: int, last: int, chunk: int, marks: Collection[int]) -> Iterator[int]:
    """Ends of the chunks between two positions."""
    while first < last:
        ahead = [mark for mark in marks if first < mark < last]
        first = min([(first // chunk + 1) * chunk, last, *ahead])
        yield first


def _tree_cache(
    cache: object, refusal: str, quantization: Quantization | None, steps_back: int
) -> TreeCache | StateCache | CacheGroup:
    """Our cache in place of one of mlx-lm's; UserError if that kind cannot branch."""
    if type(cache) is KVCache:
        return TreeCache(quantization=quantization)
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return TreeCache(window=cache.max_size)
    if type(cache) is ChunkedKVCache:
        return TreeCache(window=cache.chunk_size, in_chunks=True)
    if type(cache) is ArraysCache:
        return StateCache(len(cache.cache), steps_back)
    if type(cache) is CacheList:
        more = refusal, quantization, steps_back
        return CacheGroup([_tree_cache(member, *more) for member in cache.caches])
    raise UserError(
        f"{refusal} keeps its past in a {type(cache).__name__}, which cannot branch; "
        "generate with --no-draft"
    )
