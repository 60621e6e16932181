"""python -m redrafter_mlx.doctor on tiny models: what it says, keeps to itself, and ends with."""

import json
import logging
from dataclasses import replace

import mlx.core as mx
import pytest

from families import build
from redrafter_mlx import diagnosis, doctor
from redrafter_mlx.diagnosis import Answer, Check
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.generation import Generation, Token
from redrafter_mlx.loading import drafters, hub
from redrafter_mlx.target.adapter import adapt
from support import TinyTokenizer, random_drafter


class Tokenizer(TinyTokenizer):
    has_chat_template = True

    def apply_chat_template(self, *args, **kwargs):
        return self.encode(super().apply_chat_template(*args, **kwargs))[:40]


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
    """What --model loads, whatever its name."""
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))
    model = build("llama")
    drafter = random_drafter(model)
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: (model, Tokenizer()))
    monkeypatch.setattr(drafters, "load_drafter", lambda *args, **kwargs: drafter)
    return model


def command(*words) -> int:
    return doctor.main(["--model", "tiny", "--tokens", "8", *map(str, words)])


def test_a_good_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert command("--json", path) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles[:5] == ["Machine", "Checks", "Model", "Costs", "Answers"]
    report = json.loads(path.read_text())
    assert titles[5:] == [report["verdict"]]
    assert report["model"]["trees"] is True
    assert 0 <= report["model"]["difference"] <= report["model"]["allowed"]
    assert report["model"]["caches"] == {"KVCache": len(adapt(hub.load()[0]).model.layers)}
    assert list(report["milliseconds"]["passes"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert len(report["milliseconds"]["drafts"]) == 3
    assert [answer["position"] for answer in report["answers"]] == [None] * 3
    assert report["machine"]["versions"]["mlx"] == mx.__version__


def test_nothing_private_is_in_it(tmp_path, monkeypatch, capsys):
    """Neither the user's name, nor the host's, nor where anything lies."""
    home = tmp_path / "someone"
    (home / "secret" / "my-model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(home / "cache"))
    monkeypatch.setattr("platform.node", lambda: "hostess")
    path = tmp_path / "report.json"
    args = ["--model", str(home / "secret" / "my-model"), "--tokens", "4", "--json", str(path)]
    assert doctor.main(args) == 0
    text = path.read_text()
    assert "my-model" in text
    for word in ("someone", "secret", "hostess", str(tmp_path)):
        assert word not in text
        assert word not in capsys.readouterr().out


def test_a_model_that_cannot_branch_is_no_error(monkeypatch, tmp_path, capsys):
    refused = build("deepseek_v41")
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: (refused, Tokenizer()))
    path = tmp_path / "report.json"
    assert command("--json", path) == 0
    out = capsys.readouterr().out
    assert "refused: " in out
    report = json.loads(path.read_text())
    assert report["model"]["trees"] is False
    assert "cannot branch" in report["model"]["refused"]
    assert report["verdict"].startswith("No speculation with this model")
    assert "milliseconds" not in report


def broken(monkeypatch, at: int = 3):
    """Drafted runs say another token at one place."""
    tokens = Generation.__iter__

    def wrong(self):
        for number, token in enumerate(tokens(self)):
            if number == at and self._knowledge is not None:
                token = Token((token.id + 1) % 50, *list(vars(token).values())[1:])
            yield token

    monkeypatch.setattr(Generation, "__iter__", wrong)


def test_texts_that_differ_end_it_with_1(monkeypatch, capsys):
    broken(monkeypatch)
    assert command() == 1
    out = capsys.readouterr().out
    assert "parts at token 3" in out
    assert "not a tie" in out
    assert out.splitlines()[-1].startswith("Do not use auto with this model: 3 of 3 texts differ")


def test_a_tie_does_not(monkeypatch, capsys):
    broken(monkeypatch)
    monkeypatch.setattr(diagnosis, "tie", lambda target: float("inf"))
    assert command() == 0
    assert "a tie" in capsys.readouterr().out


def test_ties_are_wider_where_the_probe_saw_more(model):
    target = adapt(model)
    assert diagnosis.tie(target) == diagnosis.TIE
    half = build("llama")
    half.set_dtype(mx.bfloat16)
    found = adapt(half)
    assert found.dtype == mx.bfloat16
    found.parity = replace(found.parity, logits=0.05)
    assert diagnosis.tie(found) == pytest.approx(0.2), "both logits off by that, and twice that"


def test_where_a_text_ends_early_is_no_tie():
    assert not Answer(9, 1.0, 1.0, 1.0, position=4, margin=None).is_same(1e9)


def test_each_check_that_fails_says_what_to_do(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(diagnosis, "installed_version", lambda name: "0.1")
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0, 0))
    monkeypatch.setattr(diagnosis.blas, "preload", lambda: None)
    checks = {check.name: check for check in diagnosis.machine_checks()}
    assert {"mlx", "mlx-lm", "cache", "quiet"} <= {n for n, c in checks.items() if not c.is_fine}
    assert all(check.advice for check in checks.values())
    assert "pip install -U 'mlx>=" in checks["mlx"].advice
    assert "REDRAFTER_MLX_CACHE" in checks["cache"].advice
    assert command() == 0, "a report is a report"
    out = capsys.readouterr().out
    assert out.count("FAIL") == sum(not check.is_fine for check in checks.values())
    assert "-> pip install -U 'mlx>=" in out


def test_a_check_as_json():
    assert Check("a", True, "b", "c").as_dict() == {"check": "a", "fine": True, "found": "b"}
    assert Check("a", False, "b", "c").as_dict()["advice"] == "c"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "nowhere/report.json"], "no such directory nowhere"),
        (["--tokens", "0"], "--tokens 0"),
        (["--beam-width", "0"], "--beam-width 0"),
        (["--frobnicate"], "unrecognized"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(monkeypatch, capsys, words, said):
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    try:
        code = command(*words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_what_was_found_is_written_although_no_model_loads(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise UserError("no such model")

    monkeypatch.setattr(hub, "load", fail)
    path = tmp_path / "report.json"
    assert command("--json", path) == 2
    assert "no such model" in capsys.readouterr().err
    assert json.loads(path.read_text())["machine"]["cores"] >= 1


def test_a_drafter_of_no_use_is_called_so():
    facts = {"trees": True}
    slow = [Answer(9, 10.0, 9.0, 1.0)] * 3
    assert "of no use here: 0.90 times" in diagnosis.verdict("auto", facts, slow, [])
    fast = [Answer(9, 10.0, 16.0, 2.0)] * 3
    assert "1.60 times as fast as plain" in diagnosis.verdict("auto", facts, fast, [])


def test_max_gram_alone(monkeypatch, capsys, caplog):
    monkeypatch.setattr(drafters, "load_drafter", lambda *args, **kwargs: MaxGramDrafter())
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        assert command("--drafter", "max_gram") == 0
    assert "max_gram" in capsys.readouterr().out.splitlines()[-1]
    assert any("answer 1 of 3" in record.getMessage() for record in caplog.records)
