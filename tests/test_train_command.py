"""python -m redrafter_mlx.train from end to end, on a tiny target."""

from __future__ import annotations

import json
import os
import signal
import sys

import mlx.core as mx
import numpy as np
import pytest

from families import build
from redrafter_mlx import train
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.loading import drafters, hub
from redrafter_mlx.machine.storage import in_use
from redrafter_mlx.pricing.experience import read as read_experience
from redrafter_mlx.training import picture, report
from redrafter_mlx.training import run as training_run
from redrafter_mlx.training.picture import draw
from support import TinyTokenizer, generation, ids, tiny_prompt
from test_generate_command import build as build_words

SMALL = ["--data-tokens", "800", "--rows", "8", "--columns", "96", "--answer-tokens", "24",
         "--jobs", "1", "--windows", "4", "--candidates", "64", "--draft-vocab", "48"]  # fmt: skip
DATA: list[str] = []


@pytest.fixture(autouse=True)
def target(monkeypatch):
    """What --model loads, whatever its name."""
    model = build("llama")
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: (model, TinyTokenizer()))
    monkeypatch.setattr(report, "SHAPES", ((1, 5), (4, 5)))
    monkeypatch.setattr(picture, "draw", lambda *given: False)  # half a second each
    train._loaded.cache_clear()
    return model


@pytest.fixture(autouse=True)
def prompts(tmp_path_factory, monkeypatch) -> None:
    """Left alone, the target takes four times as many batches for as many answers."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "list", "of", "red", "old", "small", "ships", "and", "what", "why", "how"]
    texts = (" ".join(rng.choice(words, 6)) for _ in range(60))
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    monkeypatch.setattr(sys.modules[__name__], "DATA", ["--data", str(path)])


def command(output, *more) -> int:
    given = [*SMALL, *DATA, *map(str, more)]
    return train.main(["--model", "tiny", "--output", str(output), *given])


@pytest.mark.parametrize(
    "shape",
    [
        [],
        ["--output-layer", "trained", "--exit-dim", 40],
        ["--fused-layers", 0, 1, "--blocks", 1],
        ["--head", "medusa"],
        ["--head", "eagle3"],
        ["--head", "dflash", "--layers", 1, "--draft-vocab", 0],
    ],
    ids=["tied", "trained", "fused", "medusa", "eagle3", "dflash"],
)
def test_a_drafter_comes_out_that_loads_and_changes_no_text(tmp_path, target, shape, capsys):
    output = tmp_path / "drafter"
    assert command(output, "--steps", 6, *shape) == 0
    shown = capsys.readouterr()
    assert "step 6/6" in shown.err
    assert "| 4 x 5 |" in shown.out
    drafter = drafters.load_drafter(str(output), target)
    prompt = tiny_prompt()
    run = generation(target, prompt, drafter)
    assert ids(run) == ids(generation(build("llama"), prompt))
    assert run.stats.nodes > run.stats.rounds
    assert read_experience(output)[0.0].samples
    card = (output / "README.md").read_text()
    assert "python -m redrafter_mlx.train --model tiny" in card
    assert shown.out.strip() in card
    entries = [json.loads(line) for line in (output / "training/log.jsonl").open()]
    assert entries[-1]["step"] == 6
    assert {"loss", "tree", "chain"} <= entries[-1].keys()


def test_the_picture_of_a_run(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    log = [
        {"seconds": 0.0, "tree": 1.2, "chain": 1.1},
        {"seconds": 60.0, "loss": 3.0},
        {"seconds": 90.0, "loss": 2.0, "tree": 1.8, "chain": 1.5},
    ]
    assert draw(log, tmp_path / "training.png", "drafter for tiny")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_held_out_answers_says_so():
    nothing = report.Report(0, np.zeros((4, 4)), {})
    assert report.table(nothing).startswith("No greedy answer was kept from training")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "medusa", "--exit-dim", 40], "--exit-dim has no use for --head medusa"),
        (["--head", "eagle3", "--blocks", 3], "--blocks has no use for --head eagle3"),
        (["--head", "recurrent", "--layers", 2], "--layers has no use for --head recurrent"),
        (["--head", "eagle3", "--start-from", "demo"], "--start-from is for --head recurrent"),
        (["--head", "eagle3", "--fused-layers", 1, 9], "llama has 2 layers"),
    ],
)
def test_options_of_another_kind_of_head_are_refused(tmp_path, flags, message, capsys):
    assert command(tmp_path / "drafter", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "drafter").exists()


def test_ctrl_c_saves_and_resume_ends_like_a_whole_run(tmp_path, monkeypatch, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert command(whole, "--steps", 8) == 0
    monkeypatch.setattr(training_run, "TELL_SECONDS", 0.0)
    tell = train._tell

    def press(progress, entry):
        tell(progress, entry)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "_tell", press)
    assert command(halves, "--steps", 8) == 130
    assert "stopped after step 4 of 8" in capsys.readouterr().err
    load_head(halves, mx.float32)
    monkeypatch.setattr(train, "_tell", tell)
    assert command(halves, "--steps", 8, "--resume") == 0
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (halves / name).read_bytes()


def test_resume_refuses_other_settings(tmp_path, capsys):
    assert command(tmp_path / "out", "--steps", 2) == 0
    assert command(tmp_path / "out", "--steps", 2, "--resume", "--loss", "hard") == 2
    assert "loss was kl, is hard" in capsys.readouterr().err


def test_evaluate_measures_what_is_there(tmp_path, capsys):
    assert command(tmp_path / "out", "--steps", 2) == 0
    trained = capsys.readouterr().out
    assert command(tmp_path / "out", "--evaluate") == 0
    evaluated = capsys.readouterr().out
    assert evaluated.splitlines()[0] == trained.splitlines()[0]
    assert evaluated.count("|") == trained.count("|")


def test_a_head_is_trained_further(tmp_path, target, capsys):
    """In its shape and with its vocabulary, from where it was; resuming knows where it began."""
    first, second = tmp_path / "first", tmp_path / "second"
    shape = ["--fused-layers", 0, 1, "--blocks", 1]
    given = ["--steps", 12, "--learning-rate", 0.01, "--dtype", "float32", "--keep", 0, *shape]
    assert command(first, *given) == 0
    assert command(second, "--steps", 1, "--start-from", first) == 0
    ended, began = (
        [json.loads(line)["tree"] for line in (output / "training/log.jsonl").open()]
        for output in (first, second)
    )
    assert began[0] == ended[-1] != ended[0]
    kept, mixed = tmp_path / "kept", ["--start-from", first, "--dtype", "float32", "--keep"]
    assert command(kept, "--steps", 2, *mixed, 1) == 0
    weights = lambda output: mx.load(str(output / "model.safetensors"))
    for name, before in weights(first).items():
        assert mx.allclose(weights(kept)[name], before, atol=1e-6)
    assert any(not mx.allclose(weights(second)[n], x, atol=1e-6) for n, x in weights(first).items())
    heads = [load_head(output, mx.float32) for output in (first, second)]
    assert heads[0][0].config == heads[1][0].config
    assert heads[0][1].tolist() == heads[1][1].tolist()
    card = (second / "README.md").read_text()
    assert f"--start-from {first}" in card
    assert command(second, "--steps", 1, "--resume", *shape) == 2
    assert "start_from was" in capsys.readouterr().err


def test_a_head_can_learn_to_look_back(tmp_path, capsys):
    """Only if it is asked to; of a new head's weights, --keep holds those of the lookback."""
    first, as_it_was, grown = tmp_path / "first", tmp_path / "as-it-was", tmp_path / "grown"
    assert command(first, "--steps", 2, "--lookback-heads", 0) == 0
    assert command(as_it_was, "--steps", 1, "--start-from", first) == 0
    assert command(grown, "--steps", 1, "--start-from", first, "--lookback-heads", 3) == 0
    heads = [load_head(output, mx.float32)[0] for output in (first, as_it_was, grown)]
    assert [head.config.lookback_heads for head in heads] == [0, 0, 3]
    kept, trained = tmp_path / "kept", tmp_path / "trained"
    for output, share in ((kept, 1), (trained, 0)):
        assert command(output, "--steps", 2, "--dtype", "float32", "--keep", share) == 0
    heads = [mx.load(str(output / "model.safetensors")) for output in (kept, trained)]
    differs = {n for n, x in heads[0].items() if not mx.array_equal(x, heads[1][n])}
    assert {"lookback.carry", "lookback.out.weight", "lookback.key_token.weight"} <= differs
    assert all(name.startswith("lookback.") for name in differs)


def test_a_head_of_another_shape_or_target_is_no_start(tmp_path, target, monkeypatch, capsys):
    assert command(tmp_path / "first", "--steps", 1) == 0
    capsys.readouterr()
    start = ["--steps", 1, "--start-from", tmp_path / "first"]
    assert command(tmp_path / "second", *start, "--blocks", 3) == 2
    assert f"--blocks 3: the head of --start-from {tmp_path / 'first'} has 2" in (
        capsys.readouterr().err
    )
    other = build_words(hidden_size=32)[0]
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: (other, TinyTokenizer()))
    train._loaded.cache_clear()
    assert command(tmp_path / "third", *start) == 2
    said = capsys.readouterr().err
    assert "was made for another target: its hidden_size is 64" in said
    assert not (tmp_path / "third").exists(), "nothing is written before it is refused"


def test_dry_run_says_what_it_takes_and_writes_nothing(tmp_path, capsys):
    assert command(tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "GB on disk" in said
    assert "GB of memory" in said
    assert not (tmp_path / "out").exists()


def test_remote_code_is_trusted_of_model_and_tokenizer(tmp_path, monkeypatch, target):
    given = {}
    load = lambda *args, **kwargs: given.update(kwargs) or (target, TinyTokenizer())
    monkeypatch.setattr(hub, "load", load)
    assert command(tmp_path / "out", "--dry-run", "--trust-remote-code") == 0
    assert given["trust_remote_code"] is given["tokenizer_config"]["trust_remote_code"] is True


def test_output_in_use_is_refused(tmp_path, capsys):
    with in_use(tmp_path / "out" / "training"):
        assert command(tmp_path / "out", "--resume", "--steps", 2) == 2
    assert "is in use by another run" in capsys.readouterr().err


def test_a_time_too_short_for_all_data_still_gives_a_drafter(tmp_path, capsys):
    assert command(tmp_path / "out", "--minutes", 0.005, "--data-tokens", 10**9) == 0
    assert "steps of 128 positions" in capsys.readouterr().err
    load_head(tmp_path / "out", mx.float32)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--keep", "1.5"], "--keep 1.5 is outside its range: 0 to 1"),
        (["--resume"], "holds no training run; leave --resume out"),
        (["--evaluate"], "holds no training run"),
        (["--exit-dim", "40"], "--exit-dim 40: a tied output needs the target's hidden size 64"),
        (["--fused-layers", "0", "7"], "layers [0, 7]: llama has 2 layers"),
        (["--loss", "magic"], "invalid choice: 'magic'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 is outside its range"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, complaint):
    try:
        code = command(tmp_path / "out", *flags)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert complaint in said
    assert len(said.splitlines()) == 1


def test_another_directory_is_never_written_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert command(tmp_path) == 2
    assert "is not empty; give another directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
