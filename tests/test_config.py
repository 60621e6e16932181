"""Options: keywords and flags agree, and what cannot be used is refused with a way out."""

import dataclasses
import math
import re

import pytest

from redrafter_mlx.cli import Parser
from redrafter_mlx.config import (
    GROUPS,
    NOT_HONOURED,
    DraftOptions,
    GenerationOptions,
    SamplingOptions,
    TuneOptions,
    add_flags,
    flag_name,
    from_flags,
    parse_keywords,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.training.options import DataOptions

FIELDS = {f.name: (group, f) for group in GROUPS for f in dataclasses.fields(group)}
NUMBERS = {name for name, (_, f) in FIELDS.items() if f.metadata["type"] in (int, float)}

# Option -> words after its flag, and the value that they mean.
EXAMPLES = {
    "max_tokens": (["-1"], -1),
    "prefill_step_size": (["7"], 7),
    "stop": (["###", "two words"], ("###", "two words")),
    "kv_bits": (["4"], 4),
    "kv_group_size": (["32"], 32),
    "quantized_kv_start": (["0"], 0),
    "temp": (["0.7"], 0.7),
    "top_p": (["0.9"], 0.9),
    "min_p": (["0.05"], 0.05),
    "min_tokens_to_keep": (["3"], 3),
    "top_k": (["40"], 40),
    "xtc_probability": (["0.5"], 0.5),
    "xtc_threshold": (["0.2"], 0.2),
    "xtc_special_tokens": (["1", "13"], (1, 13)),
    "rule": (["typical"], "typical"),
    "logit_bias": (['{"42": -1.5, "7": 2}'], {42: -1.5, 7: 2.0}),
    "repetition_penalty": (["1.1"], 1.1),
    "repetition_context_size": (["64"], 64),
    "presence_penalty": (["-0.5"], -0.5),
    "presence_context_size": (["65"], 65),
    "frequency_penalty": (["0.25"], 0.25),
    "frequency_context_size": (["66"], 66),
    "seed": (["18446744073709551615"], 2**64 - 1),
    "beam_width": (["8"], 8),
    "beam_length": (["6"], 6),
    "budget": (["0"], 0),
}


def kind_of(name: str) -> type:
    return FIELDS[name][1].metadata["type"]


def parser() -> Parser:
    made = Parser(prog="test")
    add_flags(made, *GROUPS)
    return made


def refused(function, *args, **kwargs) -> str:
    """The one-line message with which the call is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def refused_flags(words: list[str], capsys) -> str:
    """The one line on stderr with which the command line is refused."""
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# ---------------------------------------------------------------------------------------------
# Flags and keywords


def test_the_examples_cover_every_option():
    assert EXAMPLES.keys() == FIELDS.keys()
    assert len(FIELDS) == sum(len(dataclasses.fields(group)) for group in GROUPS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_means_what_the_keyword_means(name):
    group, field = FIELDS[name]
    words, value = EXAMPLES[name]
    assert value != field.default
    flags = parser().parse_args([flag_name(field), *words])
    assert from_flags(group, flags) == group(**{name: value})
    others = {other for other in GROUPS if other is not group}
    assert all(from_flags(other, flags) == other() for other in others)


@pytest.mark.parametrize("group", GROUPS)
def test_defaults_of_flags_and_keywords_are_equal(group):
    assert from_flags(group, parser().parse_args([])) == group()


@pytest.mark.parametrize("name", FIELDS)
def test_the_help_shows_every_option_with_its_default(name):
    field = FIELDS[name][1]
    text = field.metadata["help"]
    assert text
    if field.default not in (None, ()):
        text += f" (default: {field.default})"
    shown = " ".join(parser().format_help().split())
    metavar = r"( [A-Z_.\[\] ]+)?"
    assert re.search(rf" {flag_name(field)}{metavar} {re.escape(text)}( |$)", shown)


def test_a_flag_cannot_be_abbreviated(capsys):
    assert "--beam-wid" in refused_flags(["--beam-wid", "3"], capsys)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--temp", "warm"], ["--temp", "'warm'"]),
        (["--top-k", "2.5"], ["--top-k", "'2.5'"]),
        (["--seed", ""], ["--seed", "''"]),
        (["--xtc-special-tokens", "1", "x"], ["--xtc-special-tokens", "'x'"]),
        (["--max-tokens"], ["--max-tokens"]),
        (["--logit-bias", "{"], ["--logit-bias", "'{'", "JSON object"]),
        (["--logit-bias", "[1]"], ["--logit-bias", "'[1]'", "JSON object"]),
        (["--logit-bias", "3"], ["--logit-bias", "'3'", "JSON object"]),
        (["--logit-bias", '{"a": 1}'], ["--logit-bias", '{"a": 1}', "JSON object"]),
        (["--logit-bias", '{"1": "x"}'], ["--logit-bias", '{"1": "x"}', "JSON object"]),
        (["--logit-bias", '{"1": null}'], ["--logit-bias", '{"1": null}', "JSON object"]),
        (["--no-such-flag"], ["--no-such-flag", "--help"]),
        (["stray"], ["stray", "--help"]),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused_in_one_line(words, names, capsys):
    message = refused_flags(words, capsys)
    assert message.startswith("test: error: ")
    assert all(name in message for name in names)


# ---------------------------------------------------------------------------------------------
# Values


def bounds():
    for name in sorted(NUMBERS):
        meta = FIELDS[name][1].metadata
        step = 1 if meta["type"] is int else 1e-6
        if meta["low"] > -math.inf:
            yield name, meta["low"], meta["low"] - step
        if meta["high"] < math.inf:
            yield name, meta["high"], meta["high"] + step


@pytest.mark.parametrize(("name", "bound", "beyond"), bounds())
def test_the_bound_is_allowed_and_what_lies_beyond_is_refused(name, bound, beyond):
    group, field = FIELDS[name]
    is_list = isinstance(field.default, tuple)
    assert getattr(group(**{name: bound}), name) == bound
    message = refused(group, **{name: (beyond,) if is_list else beyond})
    assert flag_name(field) in message
    assert str(beyond) in message
    assert str(bound) in message  # the way out


def test_the_options_that_have_a_range_are_known():
    ranged = {name for name, *_ in bounds()}
    free = {"presence_penalty", "frequency_penalty", "xtc_special_tokens"}
    assert ranged == NUMBERS - free


@pytest.mark.parametrize("name", sorted(NUMBERS))
@pytest.mark.parametrize("value", [True, "1", math.nan, 1j, [1], {}], ids=repr)
def test_a_value_of_the_wrong_type_is_refused(name, value):
    group, field = FIELDS[name]
    is_list = isinstance(field.default, tuple)
    message = refused(group, **{name: (value,) if is_list else value})
    assert flag_name(field) in message
    assert repr(value) in message


@pytest.mark.parametrize("name", sorted(n for n in NUMBERS if kind_of(n) is int))
def test_a_fraction_is_not_a_whole_number(name):
    group, field = FIELDS[name]
    value = (2.0,) if isinstance(field.default, tuple) else 2.0
    message = refused(group, **{name: value})
    assert f"{flag_name(field)} must be a whole number, not 2.0" in message


@pytest.mark.parametrize("name", sorted(n for n in NUMBERS if kind_of(n) is float))
def test_a_whole_number_is_a_number(name):
    assert getattr(FIELDS[name][0](**{name: 0}), name) == 0


@pytest.mark.parametrize(
    "name", sorted(n for n in NUMBERS if FIELDS[n][1].default not in (None, ()))
)
def test_none_is_refused_where_there_is_a_default(name):
    assert flag_name(FIELDS[name][1]) in refused(FIELDS[name][0], **{name: None})


@pytest.mark.parametrize("budget", ["auto", 0, 1024])
def test_budgets(budget):
    assert DraftOptions(budget=budget).budget == budget
    flags = parser().parse_args(["--budget", str(budget)])
    assert from_flags(DraftOptions, flags) == DraftOptions(budget=budget)


@pytest.mark.parametrize("budget", [-1, 1025, "16", "AUTO", 2.0, True, None, [1]], ids=repr)
def test_a_budget_that_is_none_is_refused_with_the_way_out(budget):
    message = refused(DraftOptions, budget=budget)
    assert "--budget" in message
    assert "auto" in message
    assert str(budget) in message


def test_a_budget_flag_that_cannot_be_read_is_refused(capsys):
    assert "'much' is neither auto nor" in refused_flags(["--budget", "much"], capsys)


@pytest.mark.parametrize("contexts", [(), (512, 128), (64, 64)])
def test_contexts_that_do_not_ascend_are_refused(contexts):
    assert "--contexts" in refused(TuneOptions, contexts=contexts)


@pytest.mark.parametrize("name", [n for n in FIELDS if FIELDS[n][1].default is None])
def test_none_switches_an_option_off_that_is_off_by_default(name):
    group, _ = FIELDS[name]
    assert group(**{name: None}) == group()


@pytest.mark.parametrize("name", ["temp", "repetition_penalty"])
def test_infinity_is_refused(name):
    message = refused(SamplingOptions, **{name: math.inf})
    assert flag_name(FIELDS[name][1]) in message
    assert "inf" in message


@pytest.mark.parametrize("value", [3, "12", (1, "2"), (1.0,)], ids=repr)
def test_special_tokens_that_are_no_ids_are_refused(value):
    assert "--xtc-special-tokens" in refused(SamplingOptions, xtc_special_tokens=value)


@pytest.mark.parametrize(
    "value", ["x", 3, [1], {"a": 1.0}, {1.5: 1.0}, {1: "x"}, {1: None}, {1: math.nan}], ids=repr
)
def test_a_bias_that_is_no_mapping_of_ids_to_numbers_is_refused(value):
    assert "--logit-bias" in refused(SamplingOptions, logit_bias=value)


@pytest.mark.parametrize("value", [5, (5,), ("a", None)], ids=repr)
def test_stop_strings_that_are_no_strings_are_refused(value):
    assert "--stop" in refused(GenerationOptions, stop=value)


def test_a_single_stop_string_is_one_stop_string():
    assert GenerationOptions(stop="###").stop == ("###",)


@pytest.mark.parametrize("stop", ["", ("a", "")])
def test_an_empty_stop_string_is_refused(stop):
    assert "--stop ''" in refused(GenerationOptions, stop=stop)


def test_no_tokens_at_all_is_refused_with_the_way_out():
    message = refused(GenerationOptions, max_tokens=0)
    assert "--max-tokens 0" in message
    assert "-1" in message


def test_flags_are_checked_as_keywords_are():
    flags = parser().parse_args(["--top-p", "1.5"])
    assert "--top-p 1.5" in refused(from_flags, SamplingOptions, flags)


@pytest.mark.parametrize("group", GROUPS)
def test_options_cannot_be_changed_after_they_were_checked(group):
    options = group()
    name = dataclasses.fields(group)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, name, -5)


# ---------------------------------------------------------------------------------------------
# Keywords that are unknown or not honoured


def test_keywords_are_sorted_into_their_groups():
    keywords = {name: value for name, (_, value) in EXAMPLES.items()}
    generation, sampling, draft = parse_keywords(keywords, *GROUPS)
    assert isinstance(generation, GenerationOptions)
    assert isinstance(sampling, SamplingOptions)
    assert isinstance(draft, DraftOptions)
    for options in (generation, sampling, draft):
        for name, value in dataclasses.asdict(options).items():
            assert value == keywords.pop(name)
    assert keywords == {}


def test_groups_without_keywords_have_their_defaults():
    assert parse_keywords({}, *GROUPS) == [group() for group in GROUPS]
    draft, generation = parse_keywords({"budget": 3}, DraftOptions, GenerationOptions)
    assert (draft, generation) == (DraftOptions(budget=3), GenerationOptions())


def test_an_unknown_keyword_is_refused_and_the_known_ones_are_told():
    message = refused(parse_keywords, {"temp": 1.0, "temperature": 1.0}, *GROUPS)
    assert "temperature=" in message
    assert all(name in message for name in FIELDS)


def test_a_keyword_of_another_group_is_unknown():
    assert "budget=" in refused(parse_keywords, {"budget": 3}, SamplingOptions)


@pytest.mark.parametrize("name", NOT_HONOURED)
def test_an_option_of_mlx_lm_that_is_not_honoured_is_refused_with_a_way_out(name, capsys):
    assert name not in FIELDS
    message = refused(parse_keywords, {name: None}, *GROUPS)
    assert f"{name}= cannot be honoured" in message
    assert NOT_HONOURED[name] in message
    flag = f"--{name.replace('_', '-')}"
    for words in ([flag, "4"], [f"{flag}=4"], [flag]):
        message = refused_flags(words, capsys)
        assert f"{flag} cannot be honoured" in message
        assert NOT_HONOURED[name] in message


def test_the_way_out_names_options_that_exist():
    named = {"temp", "top_p", "top_k", "min_p", "seed", "beam_length", "budget"}
    reasons = " ".join(NOT_HONOURED.values())
    assert all(f"{name}=" in reasons for name in named)
    assert named <= FIELDS.keys()


def test_wrong_keywords_are_told_before_anything_runs():
    with pytest.raises(UserError, match=r"--beam-width 0 is outside its range: 1 to 64"):
        parse_keywords({"beam_width": 0}, *GROUPS)


def test_flags_of_the_data_stage_mean_what_its_keywords_mean():
    made = Parser(prog="test")
    add_flags(made, DataOptions)
    assert from_flags(DataOptions, made.parse_args([])) == DataOptions()
    words = "--data x.jsonl --skip-bad --data-tokens 5 --data-minutes 0.5 --rows 3 --memory 2"
    assert from_flags(DataOptions, made.parse_args(words.split())) == DataOptions(
        data="x.jsonl", skip_bad=True, data_tokens=5, data_minutes=0.5, rows=3, memory=2.0
    )
    help = made.format_help()
    assert all(flag_name(f) in help for f in dataclasses.fields(DataOptions))


@pytest.mark.parametrize(
    ("name", "value"),
    [("data_tokens", 0), ("rows", 0), ("columns", 15), ("memory", -1.0), ("data_minutes", math.nan),
     ("skip_bad", "no"), ("data", 3)],
)  # fmt: skip
def test_wrong_options_of_the_data_stage_are_refused(name, value):
    with pytest.raises(UserError, match=flag_name(DataOptions.__dataclass_fields__[name])):
        DataOptions(**{name: value})
