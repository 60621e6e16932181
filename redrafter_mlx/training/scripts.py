"""What the rows of a batch play: conversations the target writes alone, or the user's prompts.

With no data the target writes the user's part too: given its chat template up to the user's turn,
an instruction-tuned model continues with a question (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.training.lockstep import Part, Role, Script
from redrafter_mlx.training.questions import Question

ANSWER_TEMPS = (0.0, 0.0, 0.7, 1.0)
"""Temperatures of the answers, drawn evenly: most people serve a model greedily or nearly so."""
QUESTION_TEMP = 1.0
QUESTION_LIMIT, PASSAGE_LIMIT = 160, 320
"""Most tokens of a question the target makes up, without and with a text to work on."""
TEXT_START = 32
"""Tokens of a given text that the target continues."""
WARM_UP = 8
"""First tokens of a text that the target makes up, written at temperature 1: greedily it would
begin every text alike."""
OPENERS = (
    "Write", "Explain", "Summarize", "Translate", "What", "How", "Why", "Who", "When", "Where",
    "Which", "Can you", "Could you", "Give me", "List", "Describe", "Compare", "Create", "Rewrite",
    "Tell me", "Help me", "I", "My", "The", "A", "In", "If", "Is", "Do", "Please", "Read",
    "Solve", "Calculate", "Find", "Imagine", "You are", "Identify", "Classify", "Here is",
    "Given", "Question:", "Python", "Let's", "A train", "There are", "Write a function that",
    "How many", "What is the difference between", "Act as", "Suppose", "Convert", "Complete",
)  # fmt: skip
"""First words of a question: left alone, a small model asks much the same ones."""
TOPICAL = (
    "Explain", "What is", "Write about", "Write a story about", "Tell me about", "Who was",
    "Describe", "Give me three facts about", "Write a poem about", "Why is", "How does",
    "What is the meaning of", "Write a short essay on", "Compare", "What are the benefits of",
    "Write an email about", "Can you explain", "I want to learn about", "The history of",
    "Where is", "When did", "Give me a list of", "Teach me about", "Is it true that",
)  # fmt: skip
"""First words that a word of the target's vocabulary follows: an endless supply of topics."""
PASSAGES = (
    "Summarize the following article:", "Read the passage and answer the question.\n\n",
    "Summarize this text in one paragraph:", "Rewrite the following text:", "Context:", "Passage:",
    "Answer the question using the text below.\n\n", "Article:", "Correct the following text:",
    "Here is a report about", "What is the main idea of this text?\n\n", "Document:", "(News)",
)  # fmt: skip
"""First words of a question that holds a text to work on, again followed by a word."""
LANGUAGES = ("English", "German", "French", "Spanish", "Italian", "Portuguese", "Dutch")
FOLLOW_UPS = (
    "Summarize", "Translate that", "Now", "Why", "Can you", "Rewrite", "What about", "And", "Give",
    "Explain", "In the text", "Is", "Shorten", "How", "Are you sure", "Write", "Thanks", "Who",
)  # fmt: skip
_SAID = ("\u2460one", "\u2461two", "\u2462three")


@dataclass(frozen=True)
class Template:
    """A chat template cut into the text and token ids that stand between what people say.

    opening   before the first user turn
    reply     between a user turn and the answer
    question  between an answer and the next user turn
    stops     ids that end an answer
    asked     ids that end a question that the target writes
    texts     the text of `opening` and of `question`
    """

    opening: tuple[int, ...]
    reply: tuple[int, ...]
    question: tuple[int, ...]
    stops: frozenset[int]
    asked: frozenset[int]
    texts: tuple[str, str]

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> Template | None:
        """The tokenizer's template; None if it has none. UserError if it cannot be cut."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        roles = ("user", "assistant", "user")
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, _SAID, strict=True)
        ]
        try:
            first, whole = _render(tokenizer, messages[:1]), _render(tokenizer, messages)
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"the chat template of the model cannot be used: {one_line(error)}"
            ) from error
        if any(whole.count(text) != 1 for text in _SAID) or first.count(_SAID[0]) != 1:
            raise UserError(
                "the chat template of the model changes what people say, so no data can be "
                "written with it; load the model without it (tokenizer_config) for plain texts"
            )
        opening, reply = first.split(_SAID[0])
        before, rest = whole.split(_SAID[1])
        question = rest[: rest.index(_SAID[2])]
        reply_ids = _after(tokenizer, opening + _SAID[0], reply)
        question_ids = _after(tokenizer, before + _SAID[1], question)
        # a mark that is ordinary text, such as a new line, may stand within an answer
        marks = set(tokenizer.get_added_vocab().values()) & {*reply_ids[:1], *question_ids[:1]}
        stops = frozenset(tokenizer.eos_token_ids) | marks
        asked = stops | set(reply_ids[:1])
        texts = (opening, question)
        return cls(_encode(tokenizer, opening), reply_ids, question_ids, stops, asked, texts)

    @staticmethod
    def system_opening(tokenizer: TokenizerWrapper, system: str) -> str | None:
        """The text before the first user turn, with a system turn; None if it has no place."""
        messages = [
            {"role": "system", "content": system}, {"role": "user", "content": _SAID[0]}
        ]  # fmt: skip
        try:
            opening, *rest = _render(tokenizer, messages).split(_SAID[0])
        except Exception:  # a template without a system turn may raise anything
            return None
        return opening if system.strip() in opening and len(rest) == 1 else None

    def opened(self, tokenizer: TokenizerWrapper, system: str) -> tuple[str, tuple[int, ...]]:
        """Text and ids before the first user turn, with the system turn if it has a place."""
        with_system = self.system_opening(tokenizer, system) if system else None
        if with_system is None:
            return self.texts[0], self.opening
        return with_system, _encode(tokenizer, with_system)


def _render(tokenizer: TokenizerWrapper, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: TokenizerWrapper, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _after(tokenizer: TokenizerWrapper, before: str, text: str) -> tuple[int, ...]:
    """The ids of `text` where it follows `before`: some tokenizers put a space before a text."""
    head, whole = _encode(tokenizer, before), _encode(tokenizer, before + text)
    return whole[len(head) :] if whole[: len(head)] == head else _encode(tokenizer, text)


def text_opening(tokenizer: TokenizerWrapper) -> tuple[int, ...]:
    """What a text begins with: the tokenizer's own first token, or a new line."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return (bos,) if bos is not None else _encode(tokenizer, "\n")[-1:]


def own_conversations(
    template: Template, tokenizer: TokenizerWrapper, seed: str, limit: int
) -> Iterator[Script]:
    """An endless supply of conversations that the target writes alone.

    seed   the same seed gives the same scripts
    limit  most tokens of an answer

    Two in seven questions are all the target's own; the others begin with given words.
    """
    draw = random.Random(seed)
    words = _words(tokenizer)

    def opener() -> tuple[str, int]:
        """First words of a question, and how long it may become."""
        kind = draw.choice(("none", "none", "opener", "topic", "topic", "passage", "passage"))
        if kind == "none":
            return "", QUESTION_LIMIT
        if kind == "opener":
            return draw.choice(OPENERS), QUESTION_LIMIT
        if kind == "topic":
            return draw.choice(TOPICAL) + draw.choice(words), QUESTION_LIMIT
        if draw.random() < 0.3:
            first, second = draw.sample(LANGUAGES, 2)
            return f"Translate from {first} to {second}:" + draw.choice(words), PASSAGE_LIMIT
        return draw.choice(PASSAGES) + draw.choice(words), PASSAGE_LIMIT

    while True:
        turns = draw.choice((1, 1, 1, 2, 3))
        answer = Part(Role.ASSISTANT, (), limit, draw.choice(ANSWER_TEMPS), template.stops)
        script = []
        for turn in range(turns):
            if turn == 0:
                before, ids = template.texts[0], template.opening
                first, most = opener()
            else:
                before, ids = template.texts[1], template.question
                first, most = draw.choice(("", *FOLLOW_UPS)), QUESTION_LIMIT
            script += [
                Part(Role.TEMPLATE, ids),
                Part(Role.USER, _after(tokenizer, before, first)),
                Part(Role.USER, (), most, QUESTION_TEMP, template.asked),
                Part(Role.TEMPLATE, template.reply),
                answer,
            ]
        yield script


def _words(tokenizer: TokenizerWrapper) -> list[str]:
    """Vocabulary entries that are whole words of four letters or more, each after a space."""
    texts = (tokenizer.decode([i]) for i in sorted(set(tokenizer.get_vocab().values())))
    words = [text for text in texts if len(text) > 4 and text[0] == " " and text[1:].isalpha()]
    return words or [""]


def own_texts(tokenizer: TokenizerWrapper, seed: str, limit: int) -> Iterator[Script]:
    """An endless supply of plain texts, for a target without a chat template; arguments as above.

    The beginning counts as given, since it is written at another temperature than the rest.
    """
    draw = random.Random(seed)
    stops = frozenset(tokenizer.eos_token_ids)
    opening = Part(Role.TEMPLATE, text_opening(tokenizer))
    warm_up = Part(Role.USER, (), WARM_UP, 1.0, stops, goes_on=True)
    while True:
        temp = draw.choice(ANSWER_TEMPS)
        yield [opening, warm_up, Part(Role.ASSISTANT, (), limit, temp, stops)]


def answered(
    template: Template | None,
    tokenizer: TokenizerWrapper,
    question: Question,
    seed: str,
    limit: int,
) -> Script:
    """A given conversation, its user's turns answered by the target, or a given text, continued.

    seed   of the temperature; other arguments as above
    """
    temp = random.Random(seed).choice(ANSWER_TEMPS)
    if template is None or question.is_text:
        text = _encode(tokenizer, question.turns[0])
        answer = Part(Role.ASSISTANT, (), limit, temp, frozenset(tokenizer.eos_token_ids))
        given = text[:TEXT_START] if question.is_text else text
        opening = Part(Role.TEMPLATE, text_opening(tokenizer))
        return [opening, Part(Role.USER, given), answer]
    script: list[Part] = []
    before, ids = template.opened(tokenizer, question.system)
    for text in question.turns:
        script += [
            Part(Role.TEMPLATE, ids),
            Part(Role.USER, _after(tokenizer, before, text)),
            Part(Role.TEMPLATE, template.reply),
            Part(Role.ASSISTANT, (), limit, temp, template.stops),
        ]
        before, ids = template.texts[1], template.question
    return script


def prompt_length(script: Script) -> int:
    """Tokens that are given before the target first writes."""
    length = 0
    for part in script:
        if part.limit:
            break
        length += len(part.tokens)
    return length
