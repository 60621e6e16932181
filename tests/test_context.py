"""Prompts that are longer than a model's context."""

from __future__ import annotations

import mlx.nn as nn
import pytest

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading.context import fitting, known_positions


def test_what_a_config_says():
    model = build("gpt2")
    assert known_positions(model) == model.args.n_positions
    assert known_positions(nn.Linear(2, 2)) is None


def test_a_prompt_that_fits_is_left_alone():
    assert fitting(range(9), 10, False) == list(range(9))
    assert fitting(range(9), None, False) == list(range(9))


def test_a_longer_one_is_refused_in_tokens():
    with pytest.raises(UserError, match="has 8,192 tokens, and the model knows 8,192 positions"):
        fitting(range(8192), 8192, False)


def test_its_middle_can_be_left_out():
    fit = fitting(range(1000), 80, True)
    assert len(fit) == 70
    assert fit[:17] == list(range(17))
    assert fit[17:] == list(range(1000 - 53, 1000))


def test_the_command_refuses_before_it_reads(demo_path, tmp_path, capsys, monkeypatch):
    from redrafter_mlx.generate import main

    text = tmp_path / "long.txt"
    text.write_text("word " * 9000)
    with open(text, encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(["--prompt", "-", "--no-draft", "--max-tokens", "2"]) == 2
    assert "and the model knows 8,192 positions" in capsys.readouterr().err
