"""mlx_lm.stream_generate and mlx_lm.generate, with drafts: a run's tokens as text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import TextStateMachine, wired_limit
from mlx_lm.sample_utils import LogitsProcessor
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions, parse_keywords
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.generation import Generation
from redrafter_mlx.rounds.stats import Stats


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token: mlx_lm's fields, and the run's statistics so far.

    text               newly decoded text; may be empty
    token              token id
    from_draft         whether the drafter had proposed it
    prompt_tokens, prompt_tps, generation_tokens, generation_tps, peak_memory (GB)
    finish_reason      None, "stop" (end-of-text token or stop string) or "length"
    end_of_round       no further token of the same round follows: a good moment to flush
    kept               tokens so far whose text stays; later ones may belong to a stop string
    stopped_by         the stop string that ended the text
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
    """`text_events`, and None after each chunk of the prompt, as `Generation.turns` has it."""
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
        stats = run.stats
        yield GenerationResponse(
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
        if reason:
            return


class _Text:
    """The text of tokens up to the first stop string.

    kept        tokens whose text has been handed on, at least in part
    stopped_by  the stop string that was found
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
        """The text to hand on after one more token; what may begin a stop string is held back."""
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
