"""Scripts: the template cut into pieces gives the tokens that the template itself gives."""

from itertools import islice

import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.lockstep import Part, Role
from redrafter_mlx.training.questions import Question
from redrafter_mlx.training.scripts import (
    TEXT_START,
    WARM_UP,
    Template,
    answered,
    own_conversations,
    own_texts,
    prompt_length,
    text_opening,
)
from support import TinyTokenizer

TOKENIZER = TinyTokenizer()
END = TinyTokenizer.END


def given(script, answers):
    """All tokens of a script, with the target's parts filled in."""
    answers = iter(answers)
    return [t for part in script for t in (next(answers) if part.limit else part.tokens)]


def test_a_conversation_has_the_tokens_of_its_rendering():
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "so"},
    ]
    question = Question(("Hi", "Why?"), system="brief")
    script = answered(Template.of(TOKENIZER), TOKENIZER, question, "0", 9)
    answers = [TOKENIZER.encode(text) for text in ("Yo", "so")]
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert [*given(script, answers), END] == TOKENIZER.encode(rendered)
    assert [part.limit for part in script if part.limit] == [9, 9]
    assert all(part.stops == {END} for part in script if part.limit)
    assert [part.role for part in script[:4]] == [0, 1, 0, 2]


def test_the_demo_models_template_is_cut_as_it_is_served(demo_path):
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(demo_path)
    template = Template.of(tokenizer)
    for system in ("", "Be brief."):
        script = answered(template, tokenizer, Question(("Hi  there",), system), "0", 9)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": "Hi  there"})
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert given(script, [[]]) == served
        assert prompt_length(script) == len(served)


def test_a_template_without_a_place_for_a_system_turn_leaves_it_out():
    class NoSystem(TinyTokenizer):
        def apply_chat_template(self, messages, **options):
            if messages[0]["role"] == "system":
                raise ValueError("no system turns")
            return super().apply_chat_template(messages, **options)

    tokenizer = NoSystem()
    template = Template.of(tokenizer)
    scripts = [
        answered(template, tokenizer, Question(("Hi",), system), "0", 9) for system in ("", "x")
    ]
    assert scripts[0] == scripts[1]
    assert template.system_opening(tokenizer, "x") is None


def test_ordinary_text_between_turns_ends_questions_but_not_answers():
    class Plain(TinyTokenizer):
        def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
            names = {"user": "Q", "assistant": "A"}
            return "\n".join(f"{names[m['role']]}:{m['content']}" for m in messages) + "\nA:"

    template = Template.of(Plain())
    newline = TOKENIZER.encode("\n")[0]
    assert template.stops == {END}
    assert template.asked == {END, newline}


def test_tokenizers_that_put_a_space_before_a_text_are_seen_through():
    class Spaced(TinyTokenizer):
        def encode(self, text, add_special_tokens=True):
            return super().encode(" " + text)

    tokenizer = Spaced()
    script = answered(Template.of(tokenizer), tokenizer, Question(("Hi", "Ho")), "0", 9)
    messages = [{"role": "user", "content": "Hi"}]
    served = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert given(script[:4], [[]]) == tokenizer.encode(served)


def test_templates_that_cannot_be_used_are_refused():
    class Broken(TinyTokenizer):
        def apply_chat_template(self, messages, **options):
            raise KeyError("tools")

    class Shouting(TinyTokenizer):
        def apply_chat_template(self, messages, **options):
            return super().apply_chat_template(messages, **options).upper()

    with pytest.raises(UserError, match="cannot be used: the key 'tools' is missing"):
        Template.of(Broken())
    with pytest.raises(UserError, match="changes what people say"):
        Template.of(Shouting())
    assert Template.of(TinyTokenizer(chat=False)) is None


def test_own_conversations_are_the_seeds_and_have_one_to_three_turns():
    template = Template.of(TOKENIZER)
    make = lambda seed: list(islice(own_conversations(template, TOKENIZER, seed, 30), 60))
    assert make("0/1") == make("0/1") != make("0/2")
    for script in make("0/1"):
        written = [part for part in script if part.limit]
        assert len(written) in (2, 4, 6)
        assert {part.temp for part in written[::2]} == {1.0}
        assert len({part.temp for part in written[1::2]}) == 1
        assert [part.role for part in written[:2]] == [Role.USER, Role.ASSISTANT]
    assert {part.temp for s in make("0/1") for part in s if part.role == Role.ASSISTANT} == {
        0.0,
        0.7,
        1.0,
    }


def test_plain_texts_begin_at_random_and_go_on():
    opening, warm_up, text = next(own_texts(TinyTokenizer(chat=False), "0", 50))
    assert opening.tokens == (TinyTokenizer.BOS,)
    assert (warm_up.limit, warm_up.temp, warm_up.goes_on) == (WARM_UP, 1.0, True)
    assert (text.limit, text.goes_on) == (50, False)
    # what is written at temperature 1 is no part of an answer that may be greedy throughout
    assert (warm_up.role, text.role) == (Role.USER, Role.ASSISTANT)


def test_given_texts_are_continued_with_and_without_a_template():
    question = Question(("x" * 100,), is_text=True)
    for template in (None, Template.of(TOKENIZER)):
        opening, start, answer = answered(template, TOKENIZER, question, "0", 50)
        assert opening.tokens == text_opening(TOKENIZER)
        assert len(start.tokens) == TEXT_START
        assert answer.limit == 50
    whole = answered(None, TOKENIZER, Question(("x" * 100, "next")), "0", 50)[1]
    assert len(whole.tokens) == 100  # a prompt is given whole


def test_a_text_begins_with_a_new_line_where_there_is_no_first_token():
    tokenizer = TinyTokenizer(chat=False)
    tokenizer.bos_token_id = None
    assert text_opening(tokenizer) == tuple(tokenizer.encode("\n"))


def test_the_prompt_ends_where_the_target_writes():
    script = [Part(Role.TEMPLATE, (1, 2)), Part(Role.USER, (3,)), Part(Role.ASSISTANT, limit=2)]
    assert prompt_length([*script, Part(Role.TEMPLATE, (4,))]) == 3
