"""From a prompt to token events: what mlx_lm.stream_generate and mlx_lm.generate are, with drafts.

Three levels: `Generation` (ids and rounds), `stream_generate` (text events), `generate` (string).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import TextStateMachine, wired_limit
from mlx_lm.sample_utils import LogitsProcessor
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.config import (
    AUTO,
    DraftOptions,
    GenerationOptions,
    SamplingOptions,
    parse_keywords,
)
from redrafter_mlx.decoding import Rule, decode, overlap
from redrafter_mlx.drafters.protocol import Drafter, NoDrafter, readers_of
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.measuring.knowledge import Knowledge, knowledge_of
from redrafter_mlx.pricing.budget import AutoBudget, Budget, FixedBudget
from redrafter_mlx.rounds.round import Context, Step
from redrafter_mlx.rounds.sampling import Sampler
from redrafter_mlx.rounds.stats import Stats
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.rounds.verification import Match, Rejection, Typical
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.target.cache import Quantization
from redrafter_mlx.target.caches import LayerCaches

FIRST_USE = (
    "the first token takes a while: kernels are being compiled for this GPU, as they are when a "
    "model is first used on it; the next run has them"
)
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token: mlx_lm's fields, and the run's statistics so far.

    text               newly decoded text; may be empty
    token              token id
    from_draft         whether the drafter had proposed it
    prompt_tokens, prompt_tps, generation_tokens, generation_tps, peak_memory (GB)
    finish_reason      None, "stop" (end-of-text token or stop string) or "length"
    end_of_round       no further token of the same round follows: a good moment to flush
    kept               tokens so far whose text stays; those after them may belong to a stop string
    stopped_by         the stop string that ended it
    stats              the run's Stats, still counting
    """

    text: str
    token: int
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    end_of_round: bool
    kept: int
    stopped_by: str | None
    stats: Stats = field(repr=False)
    _logits: mx.array = field(repr=False)

    @property
    def logprobs(self) -> mx.array:
        """(V,) log-probabilities of the target at this token, before penalties; made when read."""
        logits = self._logits.astype(mx.float32)
        return logits - mx.logsumexp(logits)


@dataclass(frozen=True)
class Token:
    """A token of a run, and the logits (V,) it was chosen from."""

    id: int
    from_draft: bool
    finish_reason: str | None
    end_of_round: bool
    logits: mx.array


@dataclass(frozen=True)
class Place:
    """Where a run stands among others of its model.

    caches     of the first tokens of its prompt, which become its own; its drafter knows them too
    marks      places of the prompt at which other prompts may part from it
    alone      whether no other run waits for its turn
    clock      seconds, of this run's turns alone
    knowledge  that its drafter shares with others
    """

    caches: LayerCaches | None = None
    marks: Collection[int] = ()
    alone: Callable[[], bool] = lambda: True
    clock: Callable[[], float] = time.perf_counter
    knowledge: Knowledge | None = None


def quantization(options: GenerationOptions) -> Quantization | None:
    """Of keys and values, as the options ask for it."""
    if not options.kv_bits:
        return None
    return Quantization(options.kv_bits, options.kv_group_size, options.quantized_kv_start)


class Generation:
    """One run over one prompt: iterate to get its tokens, an end-of-text token included.

    stats  counts while it runs
    seed   of the sampling; drawn here if none was given, None at temperature 0
    tree   of the latest round, and its path
    caches, said  what the target holds of the text, and its tokens so far

    budget is for what no option says; without it `draft` decides. prompt_cache is of mlx-lm, for
    a text that the prompt follows; afterwards it holds prompt and answer too.
    place is where it stands among other runs.

    Raises UserError for an empty prompt, and for a model that cannot verify trees when there is a
    drafter.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Sequence[int],
        drafter: Drafter | None = None,
        *,
        generation: GenerationOptions,
        sampling: SamplingOptions,
        draft: DraftOptions,
        eos_token_ids: Collection[int] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
        budget: Budget | None = None,
        prompt_cache: list | None = None,
        place: Place | None = None,
    ):
        if len(prompt) == 0:
            raise UserError("the prompt is empty: it must hold at least one token")
        if sampling.seed is None and sampling.temp > 0:
            sampling = replace(sampling, seed=secrets.randbits(64))
        self.model, self.prompt, self.options = model, prompt, generation
        self.seed = sampling.seed if sampling.temp > 0 else None
        self.stats = Stats(prompt_tokens=len(prompt), rule=sampling.rule)
        self.sampler = Sampler(sampling, logits_processors)
        self._target = adapt(model, branching=drafter is not None)
        self._drafter = drafter or NoDrafter()
        self.tree: tuple[TokenTree, Sequence[int]] = TokenTree.root(), [0]
        self._draft, self._budget = draft, budget
        self._knowledge: Knowledge | None = None
        self._prompt_cache, self.said = prompt_cache, list(prompt)
        self._place = place or Place()
        self.caches = self._place.caches
        if drafter is None:
            self._budget = budget or FixedBudget(1, 2, nodes=1)
        elif budget is None and draft.budget != AUTO:
            self._budget = FixedBudget.from_options(draft)
        elif budget is None:
            self._knowledge = self._place.knowledge or knowledge_of(self._target, drafter)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._progress = progress

    @property
    def note(self) -> str:
        """What the user should know about the run so far; mostly nothing."""
        return self._budget.note if isinstance(self._budget, AutoBudget) else ""

    @property
    def plain_tps(self) -> float | None:
        """Tokens per second that plain decoding would give here; None if nobody knows."""
        if not isinstance(self._budget, AutoBudget):
            return None
        costs = self._budget.policy.costs
        return None if costs.curve.is_disturbed else 1 / float(costs.at(len(self.said), 1)[1])

    def __iter__(self) -> Iterator[Token]:
        return (token for token in self.turns() if token is not None)

    def turns(self) -> Iterator[Token | None]:
        """The run's tokens, and None after each chunk of the prompt.

        After None, and after a token that ends a round, other runs may have their turn.
        """
        waiting = device.patience(self._say_first_use)
        try:
            context = yield from self._read_prompt()
            for step in overlap(self._rounds(context), self._place.alone):
                tokens = self.stats.read(step)
                self.tree = step.tree, step.verdict.path
                waiting.cancel()
                for place, token in enumerate(tokens):
                    drafted = place < len(step.accepted)
                    self.stats.count(drafted, place)
                    reason = self._finish_reason(token)
                    last = reason is not None or place == len(tokens) - 1
                    self.said.append(token)
                    yield Token(token, drafted, reason, last, step.logits[place])
                    if reason is not None:
                        return
        finally:
            waiting.cancel()
            if self._knowledge is not None and self.stats.tokens:
                self._knowledge.keep(len(self.prompt) + self.stats.tokens)
            if self._prompt_cache is not None and self.caches is not None:
                self._target.hand_back(
                    self.caches, self._prompt_cache, self._begun, self.said,
                    self.options.prefill_step_size,
                )  # fmt: skip

    def _say_first_use(self) -> None:
        if self._knowledge is None or self._knowledge.is_first:
            _log.info(FIRST_USE)

    def _read_prompt(self) -> Generator[None, None, Context]:
        place, how = self._place, quantization(self.options)
        if self._prompt_cache is not None:
            self.caches = self._target.caches_after(self._prompt_cache, how)
        elif self.caches is None:
            self.caches = self._target.empty_caches(how)
        self._begun = self.caches.length
        known = 0 if self._prompt_cache is not None else self._begun
        if known == 0:
            self._drafter.reset()
        self.stats.cached_tokens = known
        steps = self._target.prefill_by_chunks(
            self.prompt, self.options.prefill_step_size, self.sampler.noise, self.caches, known,
            place.marks, min(self._target.readers, readers_of([self._drafter])),
        )  # fmt: skip
        while True:
            try:
                self._progress(next(steps), len(self.prompt))
            except StopIteration as end:
                return end.value
            yield None

    def _rounds(self, context: Context) -> Iterator[Step]:
        self.stats.end_prompt()
        rounds = decode(
            self._target, self._drafter, self._rule(), self._budget_after(context), context
        )
        self.stats.start_decoding()
        most = self.options.max_tokens  # each round adds one token at least
        return islice(rounds, None if most < 0 else most)

    def _budget_after(self, context: Context) -> Budget:
        if self._knowledge is not None:
            temp, tokens = self.sampler.options.temp, self.options.max_tokens
            policy = self._knowledge.policy(
                self._draft, temp, context, max(tokens, 0), self._drafter
            )
            again = partial(self._knowledge.look_again, self._draft, drafter=self._drafter)
            self._budget = AutoBudget(policy, again, self._place.clock)
        assert self._budget is not None, "either it is given or follows from the options"
        return self._budget

    def _rule(self) -> Rule:
        rules: dict[str, Callable[[Sampler], Rule]] = {
            "match": Match,
            "rejection": Rejection,
            "typical": Typical,
        }
        return rules[self.sampler.options.rule](self.sampler)

    def _finish_reason(self, token: int) -> str | None:
        if token in self._eos_token_ids:
            return "stop"
        return "length" if self.stats.tokens == self.options.max_tokens else None


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = GenerationOptions.max_tokens,
    drafter: Drafter | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    prompt_cache: list | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate text from a prompt, token by token, like mlx_lm.stream_generate.

    model, tokenizer  as `load` returns them
    prompt            text or token ids
    drafter           from `load_drafter`; None decodes plainly. The text is the same either way,
                      unless another rule= than "match" is given
    logits_processors callables (tokens, logits (1, V)) -> logits, applied along the path; each
                      costs a synchronisation per token
    prompt_cache      of mlx-lm: `prompt` follows what it holds, and it holds prompt and answer
                      afterwards
    options           the fields of config.GenerationOptions, SamplingOptions and DraftOptions

    Raises UserError for an option that is unknown, out of range or cannot be honoured, for an
    empty prompt, and for a model that cannot verify trees when there is a drafter.
    """
    generation, sampling, draft = parse_keywords(
        {"max_tokens": max_tokens, **options}, GenerationOptions, SamplingOptions, DraftOptions
    )
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    run = Generation(
        model,
        encode(tokenizer, prompt),
        drafter,
        generation=generation,
        sampling=sampling,
        draft=draft,
        eos_token_ids=tokenizer.eos_token_ids,
        logits_processors=logits_processors or (),
        progress=prompt_progress_callback or (lambda done, total: None),
        prompt_cache=prompt_cache,
    )
    return text_events(run, tokenizer)


def text_events(run: Generation, tokenizer: TokenizerWrapper) -> Iterator[GenerationResponse]:
    """Decode a run's tokens into events; a stop string ends it and is not part of its text."""
    with wired_limit(run.model):
        yield from (event for event in turns_of_text(run, tokenizer) if event is not None)


def turns_of_text(
    run: Generation, tokenizer: TokenizerWrapper
) -> Iterator[GenerationResponse | None]:
    """`text_events`, and None where the run's turns have it."""
    detokenizer, text = tokenizer.detokenizer, _Text(run.options.stop)
    for token in run.turns():
        if token is None:
            yield None
            continue
        reason = token.finish_reason
        if reason != "stop":
            detokenizer.add_token(token.id)
        if reason:
            detokenizer.finalize()
        new = text.add(detokenizer.last_segment, is_last=reason is not None)
        if text.stopped_by is not None:
            reason = "stop"
        yield _response(run.stats, token, new, reason, text)
        if reason:
            return


class _Text:
    """The text of tokens up to the first of some strings.

    kept        tokens whose text, or the beginning of it, is told: nothing of the others may be
    stopped_by  the string that was found
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        places = range(len(stops))
        machine = TextStateMachine(
            {"text": list(zip(stops, places, strict=True)), **{place: [] for place in places}}
        )
        self._state = machine.make_state("text")
        self._begins: deque[int] = deque()  # characters before each token that is not kept
        self._decoded = self._told = 0  # characters
        self.kept, self.stopped_by = 0, None

    def add(self, segment: str, is_last: bool) -> str:
        """What one more token tells: some of its characters may be held back until the next."""
        self._begins.append(self._decoded)
        self._decoded += len(segment)
        self._state, pieces = TextStateMachine.split(self._state, segment)
        new = "".join(piece for place, piece in pieces if place == "text")
        if self._state[0] != "text":
            self.stopped_by = self._stops[self._state[0]]
        elif is_last:
            new += TextStateMachine.flush(self._state)[1]
        self._told += len(new)
        is_all = is_last and self.stopped_by is None
        while self._begins and (is_all or self._begins[0] < self._told):
            self._begins.popleft()
            self.kept += 1
        return new


def _response(
    stats: Stats, token: Token, new: str, reason: str | None, text: _Text
) -> GenerationResponse:
    return GenerationResponse(
        text=new,
        token=token.id,
        from_draft=token.from_draft,
        prompt_tokens=stats.prompt_tokens,
        prompt_tps=stats.prompt_tps,
        generation_tokens=stats.tokens,
        generation_tps=stats.generation_tps,
        peak_memory=stats.peak_memory,
        finish_reason=reason,
        end_of_round=token.end_of_round or reason is not None,
        kept=text.kept,
        stopped_by=text.stopped_by,
        stats=stats,
        _logits=token.logits,
    )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int],
    verbose: bool = False,
    **options: Any,
) -> str:
    """Generate the whole answer as a string, like mlx_lm.generate; see `stream_generate`.

    verbose  print the text as it comes, and the statistics after it
    """
    text = ""
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=response.end_of_round)
    if verbose:
        print(f"\n{'=' * 10}\n{response.stats.report()}")
    return text


def encode(tokenizer: TokenizerWrapper, prompt: str | mx.array | Sequence[int]) -> list[int]:
    """Token ids of a prompt; text gets the special tokens that it does not start with already."""
    if isinstance(prompt, mx.array):
        return np.array(prompt).tolist()
    if not isinstance(prompt, str):
        return list(prompt)
    starts_special = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer.encode(prompt, add_special_tokens=not starts_special)
