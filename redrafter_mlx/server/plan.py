"""Turns a request of any API into requests to the engine, and a writer for their answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.engine import Request, Served, Turn
from redrafter_mlx.engine.conversation import Prompt, prompt_of
from redrafter_mlx.engine.request import DEFAULT
from redrafter_mlx.model_flags import OUR_ARGUMENTS
from redrafter_mlx.server.faults import ApiError
from redrafter_mlx.server.schemas import Extension, Sampled
from redrafter_mlx.server.speech import Speech
from redrafter_mlx.server.tools import Toolbox

WHOLE_TEXT = 2**31 - 1
"""How many tokens penalties look back where an API means the whole text."""

SURELY_READ = 16
"""Characters per token of the context up to which a prompt is tokenised without a check."""

_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "repetition_context_size": "repetition_context_size",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
}


@dataclass(frozen=True)
class Defaults:
    """The settings for whatever a request leaves out.

    template  arguments for the chat template
    """

    generation: GenerationOptions = field(default_factory=GenerationOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    draft: DraftOptions = field(default_factory=DraftOptions)
    template: Mapping[str, Any] = field(default_factory=dict)


class Writer(Protocol):
    """Writes answers in the form of one API.

    beat   server-sent event that keeps the connection alive before the next one comes

    `feed` takes the turns of the plan's requests; it, `end` and `failed` return server-sent events.
    `whole` returns the whole answer after the last turn, for requests that do not stream.
    """

    beat: str

    def feed(self, index: int, turn: Turn) -> list[str]: ...
    def end(self) -> list[str]: ...
    def failed(self, error: ApiError) -> list[str]: ...
    def whole(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Plan:
    """What the engine is asked for one HTTP request, and what hears and writes the answers.

    speeches  one for each of the engine's requests
    details   whether the writer needs the trees of turns
    """

    requests: Sequence[Request]
    speeches: Sequence[Speech]
    writer: Writer
    stream: bool
    details: bool = False


def plan_requests(
    served: Served,
    defaults: Defaults,
    asked: Sampled,
    prompts: Sequence[Prompt],
    stop: str | Sequence[str] | None,
    max_tokens: int | None,
    top_logprobs: int | None = None,
) -> list[Request]:
    """The engine's requests: `n` for each prompt, with consecutive seeds.

    stop, max_tokens  where an answer ends; None: as the server's own flags say

    Raises ApiError for what does not suit the model, UserError for options out of range.
    """
    extension = asked.redrafter or Extension()
    drafter = extension.drafter or DEFAULT
    if drafter not in served.drafters:
        param, known = "redrafter.drafter", ", ".join(sorted(served.drafters))
        message = f"{param} {drafter[:100]!r} is not loaded; there are: {known}"
        raise ApiError(400, message, "invalid_value", param)
    draft = {name: getattr(extension, name) for name in ("budget", "beam_width", "beam_length")}
    stop = defaults.generation.stop if stop is None else stop
    stops = [stop] if isinstance(stop, str) else stop
    requests = []
    for prompt in prompts:
        _check_context(served, prompt)
        shared = {
            "prompt": prompt.tokens,
            "marks": prompt.marks,
            "generation": _generation(served, defaults, prompt, stops, max_tokens),
            "draft": _replace(defaults.draft, draft),
            "drafter": drafter,
            "top_logprobs": top_logprobs,
        }
        for choice in range(getattr(asked, "n", None) or 1):
            sampling = _sampling(served, defaults, asked, choice)
            requests.append(Request(sampling=sampling, **shared))
    return requests


def template_prompt(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    toolbox: Toolbox,
    template: Mapping[str, Any],
    continue_last: bool = False,
    may_be_long: bool = False,
) -> Prompt:
    """The prompt of a conversation.

    template       arguments for the chat template, from `template_arguments`
    continue_last  whether the last message is the beginning of the answer
    may_be_long    whether the prompt may exceed the context

    Raises ApiError for arguments that only the server may set and for a prompt that is much too
    long, UserError if the template fails.
    """
    tokenizer = served.tokenizer
    if not may_be_long:
        check_length(served, (message["content"] for message in messages))
    if taken := sorted(template.keys() & set(OUR_ARGUMENTS)):
        param = f"chat_template_kwargs.{taken[0]}"
        raise ApiError(400, f"{param} is set by the server: leave it out", "invalid_value", param)
    if template and not tokenizer.has_chat_template:
        param = "chat_template_kwargs"
        raise ApiError(400, f"{param}: this model has no chat template", "invalid_value", param)
    if not tokenizer.has_chat_template and any("tool_calls" in one for one in messages):
        message = "messages: this model has no chat template, so it cannot be shown tool calls"
        raise ApiError(400, message, "invalid_value", "messages")
    return prompt_of(tokenizer, messages, toolbox.tools or None, continue_last, **template)


def template_arguments(
    served: Served,
    defaults: Defaults,
    own: Mapping[str, Any] | None,
    effort: str | None,
    param: str,
    thinking: bool | None = None,
) -> dict[str, Any]:
    """Arguments for the chat template: the server's, those for reasoning, and the request's own.

    own       chat_template_kwargs of the request
    effort    how hard the model should think
    param     the field that `effort` comes from, for errors
    thinking  whether it should think at all; None: as `effort` and the template say

    Raises ApiError for what the template cannot express.
    """
    tokenizer, given = served.tokenizer, dict(defaults.template)
    if effort == "none":
        thinking = bool(thinking)
    elif effort is not None:
        source = tokenizer.chat_template if tokenizer.has_chat_template else ""
        if "reasoning_effort" not in str(source):
            message = f"{param} {effort!r} cannot be honoured: the chat template cannot express it"
            raise ApiError(400, message, "unsupported_value", param)
        given["reasoning_effort"] = effort
    if thinking is not None and tokenizer.has_thinking:
        given["enable_thinking"] = thinking
    elif thinking:
        message = "thinking: this model does not think before it answers"
        raise ApiError(400, message, "unsupported_value", "thinking")
    return given | dict(own or {})


def usage_of(stats: Sequence[Mapping[str, Any]], seeds: Sequence[int | None]) -> dict[str, Any]:
    """The statistics of our extension, summed over the answers."""
    total = lambda name: sum(one.get(name, 0) for one in stats)
    rounds, tokens = total("rounds"), total("generation_tokens")
    seconds = total("decode_seconds")
    return {
        "drafted_tokens": total("drafted_tokens"),
        "accepted_tokens": total("accepted_tokens"),
        "rounds": rounds,
        "tokens_per_round": round(tokens / rounds, 4) if rounds else 0.0,
        "generation_tps": round(tokens / seconds, 3) if seconds else 0.0,
        "cached_tokens": total("cached_tokens"),
        "rules": sorted({str(one["rule"]) for one in stats if "rule" in one}),
        "seeds": list(seeds),
    }


def details_of(said, turn: Turn, text_of, tree: bool, root: int | None) -> dict[str, Any]:
    """The details of a turn in our extension, from which the page draws its pictures.

    said     (text, drafted) pieces of the chunk
    text_of  token id -> text
    tree     whether the round's tree is included
    root     the token at the root, for trees that lack it: a draft may be made before it is known
    """
    stats, shown_tree = turn.stats, None
    if tree and turn.tree is not None:
        known = [root if token < 0 else token for token in turn.tree.tokens]
        shown_tree = {
            "tokens": ["" if token is None else text_of(token) for token in known],
            "parents": [int(parent) for parent in turn.tree.parents],
            "accepted": [int(row) for row in turn.tree.accepted],
        }
    names = (
        "generation_tps", "plain_tps", "tokens_per_round", "rounds", "generation_tokens",
        "prompt_tokens", "cached_tokens",
    )  # fmt: skip
    shown = {name: stats[name] for name in names if stats.get(name) is not None}
    return {
        "pieces": [{"text": text, "drafted": drafted} for text, drafted in said],
        "tree": shown_tree,
        "stats": shown | {"prompt_done": turn.prompt_done},
    }


def refuse_details(reason: str) -> NoReturn:
    """Raise ApiError: `details` cannot be honoured."""
    param = "redrafter.details"
    raise ApiError(400, f"{param} cannot be honoured: {reason}", "unsupported_value", param)


def event(data: Mapping[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n"


def check_length(served: Served, texts: Iterable[str]) -> None:
    """Raise ApiError for a prompt that is much too long, judged by its beginning.

    Tokenising all of it could take a minute.

    texts  parts of the prompt; there may be more to it
    """
    limit, text = served.context, "".join(texts)
    if limit is None or len(text) <= SURELY_READ * limit:
        return
    begin = text[: SURELY_READ * limit]
    tokens = len(served.tokenizer.encode(begin, add_special_tokens=False))
    if tokens > limit + 1:  # the last token may be only a part of one in the whole text
        raise _too_long(f"about {round(tokens * len(text) / len(begin))}", limit)


def _check_context(served: Served, prompt: Prompt) -> None:
    limit, tokens = served.context, len(prompt.tokens)
    if tokens == 0:
        raise ApiError(400, "the prompt is empty: it must hold at least one token", "empty_prompt")
    if limit is not None and tokens >= limit:
        raise _too_long(str(tokens), limit)


def _too_long(tokens: str, limit: int) -> ApiError:
    return ApiError(
        400,
        f"the prompt has {tokens} tokens and the context of this model holds {limit}, the answer "
        "included: send a shorter prompt",
        "context_length_exceeded",
    )


def _generation(served, defaults, prompt, stops, max_tokens) -> GenerationOptions:
    most = defaults.generation.max_tokens if max_tokens is None else max_tokens
    if served.context is not None:
        room = served.context - len(prompt.tokens)
        most = room if most < 0 else min(most, room)
    return dataclasses.replace(defaults.generation, max_tokens=most, stop=tuple(stops))


def _sampling(served: Served, defaults: Defaults, asked: Sampled, choice: int) -> SamplingOptions:
    given = {ours: getattr(asked, name, None) for name, ours in _SAMPLING.items()}
    if given["top_p"] == 0:  # the likeliest token alone in the APIs, but off in mlx-lm
        given |= {"top_p": 1.0, "top_k": 1}
    for name in ("presence", "frequency"):
        if given[f"{name}_penalty"] is not None:
            given[f"{name}_context_size"] = WHOLE_TEXT
    seed = getattr(asked, "seed", None)
    seed = defaults.sampling.seed if seed is None else seed
    if seed is not None:
        given["seed"] = (seed + choice) % 2**64
    bias = getattr(asked, "logit_bias", None)
    if bias is not None:
        given["logit_bias"] = _bias(bias, served.target.vocab_size)
    given["rule"] = asked.redrafter.rule if asked.redrafter else None
    return _replace(defaults.sampling, given)


def _bias(bias: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    found = {}
    for token, added in bias.items():
        if not (token.isascii() and token.isdigit() and int(token[:12]) < vocabulary):
            message = f"logit_bias: {token!r} is not a token id below {vocabulary}"
            raise ApiError(400, message, "invalid_value", "logit_bias")
        found[int(token)] = added
    return found


def _replace(options, given: Mapping[str, Any]):
    """The options, with each value that is not None in place of theirs."""
    return dataclasses.replace(
        options, **{name: value for name, value in given.items() if value is not None}
    )
