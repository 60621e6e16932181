"""What the rows of a batch play: conversations the target writes alone, or the user's prompts.

With no data the target writes the user's part too: given its chat template up to the user's turn,
an instruction-tuned model continues with a question (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.lockstep import Part, Role, Script

ANSWER_TEMPS = (0.0, 0.0, 0.7, 1.0)
"""Temperatures of the answers, drawn evenly: most people serve a model greedily or nearly so."""
QUESTION_TEMP = 1.0
QUESTION_LIMIT = 160
OPENERS = (
    "Write", "Explain", "Summarize", "Translate", "What", "How", "Why", "Who", "When", "Where",
    "Which", "Can you", "Could you", "Give me", "List", "Describe", "Compare", "Create", "Rewrite",
    "Tell me", "Help me", "I", "My", "The", "A", "In", "If", "Is", "Do", "Please", "Read",
    "Solve", "Calculate", "Find", "Imagine", "You are", "Identify", "Classify", "Here is",
    "Given", "Question:", "Context:", "Passage:", "Article:", "Python", "Let's",
    "Summarize the following article:", "Read the passage and answer the question.",
    "Translate the following sentence", "Rewrite the following text", "Answer the question using",
)  # fmt: skip
"""First words of half of the questions: left alone, a small model asks much the same ones."""


@dataclass(frozen=True)
class Template:
    """A chat template cut into the token ids that stand between what people say.

    opening   before the first user turn
    reply     between a user turn and the answer
    question  between an answer and the next user turn
    stops     ids that end a turn
    """

    opening: tuple[int, ...]
    reply: tuple[int, ...]
    question: tuple[int, ...]
    stops: frozenset[int]

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> Template | None:
        """The tokenizer's template; None if it has none or answers cannot be told apart in it."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        said = ["\u2460one", "\u2461two", "\u2462three"]
        roles = ["user", "assistant", "user"]
        try:
            messages = [
                {"role": role, "content": text} for role, text in zip(roles, said, strict=True)
            ]
            first = _render(tokenizer, messages[:1])
            whole = _render(tokenizer, messages)
        except Exception as error:  # templates raise what they like
            raise UserError(f"the chat template of the model cannot be used: {error}") from error
        if said[0] not in first or not all(text in whole for text in said):
            raise UserError("the chat template of the model changes what people say; give --data")
        opening, reply = first.split(said[0])
        question = whole[whole.index(said[1]) + len(said[1]) : whole.index(said[2])]
        pieces = (_encode(tokenizer, text) for text in (opening, reply, question))
        opening_ids, reply_ids, question_ids = pieces
        stops = set(tokenizer.eos_token_ids) | set(reply_ids[:1]) | set(question_ids[:1])
        return cls(opening_ids, reply_ids, question_ids, frozenset(stops))


def _render(tokenizer: TokenizerWrapper, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: TokenizerWrapper, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def own_conversations(
    template: Template, tokenizer: TokenizerWrapper, seed: str, limit: int
) -> Iterator[Script]:
    """Conversations without end that the target writes alone.

    seed   the same seed gives the same scripts
    limit  most tokens of an answer
    """
    draw = random.Random(seed)
    openers = [_encode(tokenizer, text) for text in OPENERS]
    while True:
        opener = draw.choice(openers) if draw.random() < 0.5 else ()
        turns = draw.choice((1, 1, 1, 2, 3))
        temp = draw.choice(ANSWER_TEMPS)
        script = [Part(Role.TEMPLATE, template.opening), Part(Role.USER, opener)]
        for turn in range(turns):
            if turn:
                script.append(Part(Role.TEMPLATE, template.question))
            script += [
                Part(Role.USER, limit=QUESTION_LIMIT, temp=QUESTION_TEMP),
                Part(Role.TEMPLATE, template.reply),
                Part(Role.ASSISTANT, limit=limit, temp=temp),
            ]
        yield script


def own_texts(opening: Sequence[int], seed: str, limit: int) -> Iterator[Script]:
    """Plain texts without end, for a target that has no chat template."""
    draw = random.Random(seed)
    while True:
        temp = draw.choice(ANSWER_TEMPS[1:] or (1.0,))
        start = Part(Role.TEMPLATE, tuple(opening))
        warm_up = Part(Role.USER, limit=8, temp=1.0)
        del warm_up
        yield [start, Part(Role.ASSISTANT, limit=limit, temp=max(temp, 0.7))]


def answered(
    template: Template,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Sequence[str]],
    seed: str,
    limit: int,
) -> Iterator[Script]:
    """The user's turns of given conversations, each answered by the target."""
    draw = random.Random(seed)
    for turns in questions:
        temp = draw.choice(ANSWER_TEMPS)
        script: list[Part] = []
        for turn, text in enumerate(turns):
            before = template.question if turn else template.opening
            script += [
                Part(Role.TEMPLATE, before),
                Part(Role.USER, _encode(tokenizer, text)),
                Part(Role.TEMPLATE, template.reply),
                Part(Role.ASSISTANT, limit=limit, temp=temp),
            ]
        yield script
