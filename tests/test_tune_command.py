"""python -m redrafter_mlx.tune on a tiny model: what it says, keeps, draws and refuses."""

import json

import pytest

from families import build
from redrafter_mlx import tune
from redrafter_mlx.loading import drafters, hub
from redrafter_mlx.measuring.profile import identify, load
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.target.adapter import adapt
from support import TinyTokenizer, random_drafter

SMALL = ["--contexts", "16", "--rows", "4", "--turns", "3", "--tokens", "8", "--beam-width", "2",
         "--beam-length", "3"]  # fmt: skip


class Tokenizer(TinyTokenizer):
    has_chat_template = True

    def apply_chat_template(self, *args, **kwargs):
        return self.encode(super().apply_chat_template(*args, **kwargs))


@pytest.fixture(autouse=True)
def pair(monkeypatch, tmp_path):
    """What --model and --drafter load, whatever their names."""
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))
    model = build("llama")
    drafter = random_drafter(model)
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: (model, Tokenizer()))
    monkeypatch.setattr(drafters, "load_drafter", lambda *args, **kwargs: drafter)
    return model, drafter


def command(*words) -> int:
    return tune.main(["--model", "tiny", "--drafter", "tiny", *SMALL, *map(str, words)])


def test_it_says_what_pays_and_generation_finds_the_profile(pair, tmp_path, capsys):
    assert command() == 0
    out = capsys.readouterr().out
    assert "after 16 tokens: " in out
    assert "milliseconds of a pass" in out
    assert len(list((tmp_path / "cache" / "profiles").glob("*.json"))) == 1
    model, drafter = pair
    stored = load(identify(adapt(model), drafter))
    assert stored.curve.contexts == [16]
    assert stored.drafts[Setting(2, 3)] > 0
    assert len(stored.experiences["2x3 at 0.0"].samples) > 8


def test_json(capsys):
    assert command("--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["curve"]["rows"] == [1, 2, 3, 4]
    assert content["identity"]["drafter"].startswith("RecurrentDrafter")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert command("--picture", tmp_path / "curve.png") == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys, caplog):
    (tmp_path / "cache").write_text("")
    assert command() == 0
    assert "after 16 tokens: " in capsys.readouterr().out
    (line,) = [r.getMessage() for r in caplog.records if "cannot be kept" in r.getMessage()]
    assert "REDRAFTER_MLX_CACHE" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["--prompts", "EMPTY"], "holds no prompts"),
        (["--prompts", "BINARY"], "cannot be read"),
        (["--budget", "12"], "--budget 12"),
        (["--contexts", "512", "128"], "--contexts must ascend"),
        (["--contexts", "3"], "--contexts 3 is outside its range"),
        (["--turns", "1"], "--turns 1 is outside its range"),
        (["--picture", "nowhere/curve.png"], "no such directory nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, capsys, words, said):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    places = {"EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary"}
    assert command(*(places.get(word, word) for word in words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
