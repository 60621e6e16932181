"""What --drafter accepts, and what it says about everything else."""

import pytest

from redrafter_mlx.config import DrafterOptions
from redrafter_mlx.drafters.cascade import CascadeDrafter
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.spec import POSSIBLE, Spec, cascade_matrix, parse
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import drafters, hub

NONE = DrafterOptions()


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("demo", Spec("head", "demo")),
        ("org/name", Spec("head", "org/name")),
        ("./a dir/head", Spec("head", "./a dir/head")),
        ("~/head", Spec("head", "~/head")),
        ("C:/head", Spec("head", "C:/head")),
        ("./max_gram", Spec("head", "./max_gram")),
        ("recurrent:org/name", Spec("recurrent", "org/name")),
        ("eagle3:org/name", Spec("eagle3", "org/name")),
        ("recurrent:./with:colon", Spec("recurrent", "./with:colon")),
        ("max_gram", Spec("max_gram")),
        ("auto", Spec("auto")),
        ("model:org/small", Spec("model", "org/small")),
        ("union:[demo,max_gram]", Spec("union", "", (Spec("head", "demo"), Spec("max_gram")))),
        (
            " cascade:[ model:org/a , max_gram ] ",
            Spec("cascade", "", (Spec("model", "org/a"), Spec("max_gram"))),
        ),
        (
            "union:[demo,cascade:[model:a/b,max_gram]]",
            Spec(
                "union",
                "",
                (
                    Spec("head", "demo"),
                    Spec("cascade", "", (Spec("model", "a/b"), Spec("max_gram"))),
                ),
            ),
        ),
    ],
)
def test_names(text, spec):
    assert parse(text, NONE) == spec
    assert parse(str(spec), NONE) == spec


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("eagle:org/name", ["'eagle:org/name' is not a drafter"]),
        ("recurrent", ["'recurrent' is not a drafter"]),
        ("model", ["'model' is not a drafter"]),
        ("model:", ["names no weights"]),
        ("recurrent:", ["names no weights"]),
        ("union", ["union:[A,B,...]"]),
        ("union:demo,max_gram", ["union:[A,B,...]"]),
        ("cascade:[demo,max_gram", ["cascade:[A,B,...]"]),
        ("cascade:[max_gram]", ["combines 1 drafters"]),
        ("union:[]", ["is empty"]),
        ("union:[demo,,max_gram]", ["is empty"]),
        ("union:[demo],[max_gram]", ["brackets do not match"]),
        ("union:[demo,[max_gram]", ["brackets do not match"]),
        ("cascade:[model:a/b,foo:x]", ["'foo:x' is not a drafter"]),
        (
            "union:[cascade:[model:a/b,max_gram],cascade:[model:c/d,max_gram]]",
            ["has 2 cascades"],
        ),
    ],
)
def test_what_is_no_drafter_is_refused_with_the_list_of_what_is(text, named):
    message = refused(parse, text, NONE)
    assert all(name in message for name in [*named, POSSIBLE])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("union:[max_gram,max_gram]", ["max_gram twice"]),
        ("union:[demo,recurrent:demo]", ["recurrent:demo twice"]),
        ("union:[org/a,eagle3:org/a]", ["eagle3:org/a twice"]),
        ("union:[demo,auto]", ["auto cannot stand in a union"]),
        ("union:[demo,union:[max_gram,model:a/b]]", ["union cannot stand in a union"]),
        ("cascade:[max_gram,union:[demo,model:a/b]]", ["union cannot stand in a cascade"]),
        ("cascade:[model:a/b,cascade:[demo,max_gram]]", ["cascade cannot stand in a cascade"]),
        ("cascade:[max_gram,demo]", ["demo reads the target's state", "put it first"]),
    ],
)
def test_impossible_combinations(text, named):
    message = refused(parse, text, NONE)
    assert all(name in message for name in named)


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("demo", {"lenience": 2}, "--lenience 2 has no use"),
        ("max_gram", {"cascade_k": [[1]]}, "--cascade-k [[1]] has no use"),
        ("demo", {"max_gram_memory": "x"}, "--max-gram-memory x has no use"),
        ("model:a/b", {"max_gram_bigrams": "x"}, "--max-gram-bigrams x has no use"),
    ],
)
def test_an_option_that_no_drafter_can_honour_is_refused(text, options, named):
    assert named in refused(parse, text, DrafterOptions(**options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lenience": -1.0}, ["--lenience -1.0", "at least 1"]),
        ({"lenience": 0.5}, ["--lenience 0.5", "at least 1"]),
        ({"lenience": "x"}, ["--lenience", "'x'"]),
        ({"max_gram_memory_tokens": 0}, ["--max-gram-memory-tokens 0", "at least 1"]),
        ({"max_gram_memory": 3}, ["--max-gram-memory", "3"]),
        ({"max_gram_bigrams": ["x"]}, ["--max-gram-bigrams", "['x']"]),
    ],
)
def test_wrong_values(options, named):
    message = refused(DrafterOptions, **options)
    assert all(name in message for name in named)


TWO = parse("cascade:[model:a/b,max_gram]", NONE)
HEAD = parse("cascade:[demo,max_gram]", NONE)
THREE = parse("cascade:[model:a/b,model:c/d,max_gram]", NONE)


def test_k_matrices():
    assert cascade_matrix("[[5,10],[0,10]]", TWO) == [[5, 10], [0, 10]]
    assert cascade_matrix(((5, 10), (0, 10)), TWO) == [[5, 10], [0, 10]]
    assert cascade_matrix([[4, 10], [0, 0]], HEAD) == [[4, 10], [0, 0]]


@pytest.mark.parametrize(
    ("cascade", "k"),
    [
        (TWO, [[5, 10], [0, 10]]),
        (HEAD, [[5, 10], [0, 0]]),
        (THREE, [[5, 5, 10], [0, 1, 10], [0, 0, 10]]),
    ],
)
def test_default_matrices_are_allowed_ones(cascade, k):
    assert cascade_matrix(None, cascade) == k
    assert cascade_matrix(k, cascade) == k


@pytest.mark.parametrize(
    ("cascade", "k", "named"),
    [
        (TWO, "[[5,10]", ["is not JSON"]),
        (TWO, "5", ["list of lists"]),
        (TWO, 5, ["list of lists"]),
        (TWO, [5, 10], ["list of lists"]),
        (TWO, [[5, 10]], ["1 rows (2 numbers)", "has 2 levels", "2 rows of 2", "[[5,10],[0,10]]"]),
        (TWO, [[5], [0]], ["2 rows (1, 1 numbers)", "has 2 levels"]),
        (TWO, [[5, 10, 1], [0, 10, 1]], ["2 rows (3, 3 numbers)"]),
        (THREE, [[5, 10], [0, 10]], ["has 3 levels", "[[5,10,10],[0,10,10],[0,0,10]]"]),
        (TWO, [], ["0 rows"]),
        (TWO, [[5, -1], [0, 10]], ["row 1 has -1"]),
        (TWO, [[5, 1.5], [0, 10]], ["row 1 has 1.5"]),
        (TWO, [[5, "x"], [0, 10]], ["row 1 has 'x'"]),
        (TWO, [[5, 10], [0, 65]], ["row 2 has 65", "none above 64"]),
        (TWO, [[5, True], [0, 10]], ["row 1 has True"]),
        (TWO, [[5, 10], [3, 10]], ["row 2, column 1 must be 0"]),
        (TWO, [[0, 0], [0, 10]], ["first row drafts nothing"]),
        (HEAD, [[4, 10], [0, 10]], ["gives demo tokens", "only a model can review"]),
    ],
)
def test_matrices_that_do_not_fit_are_refused(cascade, k, named):
    message = refused(cascade_matrix, k, cascade)
    assert message.startswith("--cascade-k")
    assert all(name in message for name in named)


def test_a_matrix_is_checked_with_the_name():
    assert "has 2 levels" in refused(
        parse, "cascade:[model:a/b,max_gram]", DrafterOptions(cascade_k="[[1]]")
    )


# ---------------------------------------------------------------------------------------------
# Loading


@pytest.fixture(scope="module")
def demo(demo_path):
    return hub.load("demo")


def test_loading_what_needs_no_other_model(demo):
    model, _ = demo
    assert isinstance(drafters.load_drafter("max_gram", model), MaxGramDrafter)
    union = drafters.load_drafter("union:[demo,max_gram]", model)
    assert [type(member).__name__ for member in union.members] == [
        "RecurrentDrafter",
        "MaxGramDrafter",
    ]
    cascade = drafters.load_drafter("cascade:[demo,max_gram]", model, cascade_k=[[3, 9], [0, 0]])
    assert isinstance(cascade, CascadeDrafter)
    assert (cascade.k, cascade.lenience) == ([[3, 9], [0, 0]], 1.0)


def test_auto_is_max_gram_and_the_targets_own_head_if_there_is_one(demo):
    model, _ = demo
    union = drafters.load_drafter("auto", model)
    assert isinstance(union, UnionDrafter)
    assert len(union.members) == 2
    model._redrafter_name = "org/name"
    try:
        assert isinstance(drafters.load_drafter("auto", model), MaxGramDrafter)
    finally:
        model._redrafter_name = "demo"


def test_a_draft_model_needs_the_tokenizer_and_is_checked(demo, caplog):
    model, tokenizer = demo
    assert "tokenizer=" in refused(drafters.load_drafter, "model:demo", model)
    drafter = drafters.load_drafter("model:demo", model, tokenizer=tokenizer)
    assert drafter.passes == 0
    assert "demo is no smaller than the target" in caplog.text


def test_memory_and_bigrams_are_read_at_load(demo, tmp_path):
    model, tokenizer = demo
    text = tmp_path / "text.txt"
    text.write_text("one two one two one two")
    options = {"max_gram_memory": str(tmp_path / "m.json"), "max_gram_bigrams": str(text)}
    drafter = drafters.load_drafter("max_gram", model, tokenizer=tokenizer, **options)
    one, two = (tokenizer.encode(word)[0] for word in (" one", " two"))
    assert drafter.bigrams[one][0] == two
    drafter.save()
    assert (tmp_path / "m.json").exists()
    assert "tokenizer=" in refused(drafters.load_drafter, "max_gram", model, **options)
    text.write_bytes(b"\xff")
    message = refused(drafters.load_drafter, "max_gram", model, tokenizer=tokenizer, **options)
    assert "--max-gram-bigrams" in message


def test_what_load_drafter_cannot_do_is_told(demo):
    model, _ = demo
    assert "unknown option k=" in refused(drafters.load_drafter, "demo", model, k=[[1]])
    assert "revision 'v1'" in refused(drafters.load_drafter, "max_gram", model, revision="v1")
    assert "max_gram" in refused(drafters.load_drafter, "no such thing", model)


def refused(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
