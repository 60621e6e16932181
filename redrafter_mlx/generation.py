"""One run over one prompt: from its ids, by rounds, to the ids of the answer.

`stream` decodes them into text.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import LogitsProcessor

from redrafter_mlx.config import AUTO, DraftOptions, GenerationOptions, SamplingOptions
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
    "this takes a while: kernels are being compiled for this GPU, as always when a "
    "model is first used on it; later runs have them"
)
RULES: dict[str, Callable[[Sampler], Rule]] = {
    "match": Match,
    "rejection": Rejection,
    "typical": Typical,
}
_log = logging.getLogger("redrafter_mlx")


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
    marks      positions in the prompt at which other prompts may part from it
    alone      whether no other run waits for its turn
    clock      seconds, counted during this run's turns only
    knowledge  which its drafter shares with others
    """

    caches: LayerCaches | None = None
    marks: Collection[int] = ()
    alone: Callable[[], bool] = lambda: True
    clock: Callable[[], float] = time.perf_counter
    knowledge: Knowledge | None = None


def quantization(options: GenerationOptions) -> Quantization | None:
    """The quantisation of keys and values that the options ask for."""
    if not options.kv_bits:
        return None
    return Quantization(options.kv_bits, options.kv_group_size, options.quantized_kv_start)


class Generation:
    """One run over one prompt: iterate to get its tokens, an end-of-text token included.

    stats  counts while it runs
    seed   of the sampling; drawn here if none was given, None at temperature 0
    tree   of the latest round, and its path
    caches, said  what the target holds of the text, and its tokens so far

    `budget` is for what no option can say; without it `draft` decides. `prompt_cache` is mlx-lm's,
    of a text that the prompt follows; afterwards it holds prompt and answer too.

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
        self._has_said = False

    @property
    def note(self) -> str:
        """What the user should know about the run so far; usually nothing."""
        return self._budget.note if isinstance(self._budget, AutoBudget) else ""

    @property
    def plain_tps(self) -> float | None:
        """Tokens per second that plain decoding would give here; None if that is not known."""
        if not isinstance(self._budget, AutoBudget) or self._is_surveying:
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
            steps = overlap(self._rounds(context), self._place.alone)
            while (step := next(steps, None)) is not None:
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
                if self._is_surveying:  # sizes that this device has not seen may follow
                    waiting = device.patience(self._say_first_use)
        finally:
            waiting.cancel()
            if self._knowledge is not None and self.stats.tokens:
                self._knowledge.keep(len(self.prompt) + self.stats.tokens)
            if self._prompt_cache is not None and self.caches is not None:
                self._target.hand_back(
                    self.caches, self._prompt_cache, self._begun, self.said,
                    self.options.prefill_step_size,
                )  # fmt: skip

    @property
    def _is_surveying(self) -> bool:
        return isinstance(self._budget, AutoBudget) and self._budget.survey is not None

    def _say_first_use(self) -> None:
        if not self._has_said and (self._knowledge is None or self._knowledge.is_first):
            self._has_said = True
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
        rule, budget = RULES[self.sampler.options.rule](self.sampler), self._budget_after(context)
        rounds = decode(self._target, self._drafter, rule, budget, context)
        self.stats.end_prompt()
        most = self.options.max_tokens  # each round adds one token at least
        return islice(rounds, None if most < 0 else most)

    def _budget_after(self, context: Context) -> Budget:
        if self._knowledge is not None:
            policy = self._knowledge.policy(self._draft, self.sampler.options.temp)
            survey = self._knowledge.survey(self._draft, context)
            again = partial(self._knowledge.look_again, self._draft, drafter=self._drafter)
            self._budget = AutoBudget(policy, survey, again, self._place.clock)
        assert self._budget is not None, "either it is given or follows from the options"
        return self._budget

    def _finish_reason(self, token: int) -> str | None:
        if token in self._eos_token_ids:
            return "stop"
        return "length" if self.stats.tokens == self.options.max_tokens else None
