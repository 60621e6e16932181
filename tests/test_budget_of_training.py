"""--minutes hold, on a clock that only the work of training moves: no test here waits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from test_training import OPTIONS, alone, gradients_of, grammar  # noqa: F401

from benchmarks import heads
from families import build
from redrafter_mlx import train
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.loading import drafters, hub
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training import (
    data,
    deadline,
    gradients,
    lockstep,
    loop,
    picture,
    replay,
    report,
)
from redrafter_mlx.training import run as training_run
from redrafter_mlx.training.data import LEAST, write_data
from redrafter_mlx.training.deadline import NEVER, SHARES, Budget, Deadline
from redrafter_mlx.training.lockstep import Part, Role, play
from redrafter_mlx.training.loop import Progress, Trainer
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.shards import map_shard, part_path, shard_path
from support import TinyTokenizer

MODULES = (data, deadline, loop, report, training_run)
SMALL = ["--rows", "8", "--columns", "96", "--answer-tokens", "24", "--jobs", "1", "--windows", "4",
         "--candidates", "64", "--draft-vocab", "48", "--data-tokens", "500"]  # fmt: skip


class Clock:
    """Its seconds pass where work is done: a column, an update's gradients, a search's answer."""

    def __init__(self, monkeypatch, column=0.0, step=0.0, answer=0.0):
        self.now, self.steps = 1000.0, 0
        time = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        for module in MODULES:
            monkeypatch.setattr(module, "time", time)
        self._slow(monkeypatch, lockstep, "_forward", lambda: column)
        self._slow(
            monkeypatch, gradients.Crew, "of", lambda: step(self) if callable(step) else step
        )
        self._slow(monkeypatch, replay.Replayer, "of", lambda: answer)
        self._slow(monkeypatch, replay.Recaller, "of", lambda: answer)

    def _slow(self, monkeypatch, owner, name, seconds):
        work = getattr(owner, name)

        def slow(*arguments, **named):
            self.now += seconds()
            self.steps += name == "of" and owner is gradients.Crew
            return work(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def tiny(monkeypatch):
    """What --model loads, whatever its name."""
    model = build("llama")
    monkeypatch.setattr(hub, "load", lambda *args, **kwargs: (model, TinyTokenizer()))
    monkeypatch.setattr(report, "SHAPES", (report.CHAIN, report.USUAL))
    monkeypatch.setattr(report, "ALL_TOKENS", 100)
    monkeypatch.setattr(picture, "draw", lambda *given: False)  # half a second each
    train._loaded.cache_clear()
    return model


def command(output, *more) -> int:
    return train.main(["--model", "tiny", "--output", str(output), *SMALL, *map(str, more)])


def log_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "training/log.jsonl").open()]


def test_stages_end_at_set_moments_and_the_last_with_the_minutes(monkeypatch):
    clock = Clock(monkeypatch)
    budget = Budget(5)
    assert sum(SHARES.values()) == pytest.approx(1)
    clock.now += 60
    assert budget.by("data").left == pytest.approx(0.4 * 300 - 60)
    assert budget.end.left == pytest.approx(240)
    assert budget.seconds("report") == pytest.approx(24)
    budget.note("loading")
    clock.now += 180
    budget.note("data")
    assert str(budget) == "Minutes: 4.0 of --minutes 5: loading 1.0 (25%), data 3.0 (75%)."
    clock.now += 100
    budget.note("training")
    assert "too short for the least that has to be done" in str(budget)
    assert budget.end.passed
    endless = Budget(None)
    assert endless.end == endless.by("data") == NEVER
    assert not NEVER.bounded
    assert not NEVER.passed


@pytest.mark.parametrize(
    ("column", "step", "answer"),
    [
        (0.5, 4.0, 0.5),
        (0.02, 3.0, 0.01),  # all data and all of the report in time
        (1.0, 9.0, 4.0),
        (0.5, lambda clock: 2.0 if clock.steps < 20 else 9.0, 0.5),
        (0.5, lambda clock: 9.0 if clock.steps < 6 else 3.0, 0.5),
    ],
    ids=["usual", "fast", "slow", "slower and slower", "faster and faster"],
)
def test_minutes_hold_whatever_the_machine(
    tmp_path, tiny, monkeypatch, column, step, answer, capsys
):
    clock = Clock(monkeypatch, column, step, answer)
    began = clock.now
    rates = watched_rates(monkeypatch)
    assert command(tmp_path, "--minutes", 4) == 0
    assert 0.9 * 240 <= clock.now - began <= 1.1 * 240
    assert rates[-1] < 0.2 * max(rates), "the learning rate ended with the time"
    said = capsys.readouterr().out
    assert "of --minutes 4: loading" in said
    assert "data" in said.splitlines()[-1]
    load_head(tmp_path, mx.float32)
    assert said.strip() in (tmp_path / "README.md").read_text()


def watched_rates(monkeypatch) -> list[float]:
    """The learning rate of every step from now on."""
    rates, compiled = [], Trainer._compiled_update

    def watched(trainer):
        update = compiled(trainer)

        def noted(*arguments):
            updated = update(*arguments)
            rates.append(trainer._optimizer.learning_rate.item())
            return updated

        return noted

    monkeypatch.setattr(Trainer, "_compiled_update", watched)
    return rates


def test_too_few_minutes_are_admitted(tmp_path, tiny, monkeypatch, capsys):
    Clock(monkeypatch, column=5.0, step=5.0, answer=5.0)
    assert command(tmp_path, "--minutes", 1) == 0
    assert "too short for the least that has to be done" in capsys.readouterr().out


def test_given_steps_end_a_run_before_its_time_and_not_after(tmp_path, tiny, monkeypatch):
    clock = Clock(monkeypatch, column=0.1, step=6.0, answer=0.5)
    assert command(tmp_path / "few", "--minutes", 4, "--steps", 5) == 0
    assert log_of(tmp_path / "few")[-1]["step"] == 5
    began = clock.now
    assert command(tmp_path / "many", "--minutes", 4, "--steps", 5000) == 0
    assert clock.now - began <= 1.1 * 240


def test_resuming_gives_so_many_minutes_more(tmp_path, tiny, monkeypatch, capsys):
    """Also to a run that was finished, and with the data that it began with."""
    clock = Clock(monkeypatch, column=0.5, step=5.0, answer=0.5)
    assert command(tmp_path, "--minutes", 4) == 0
    first, files = log_of(tmp_path)[-1]["step"], sorted(tmp_path.rglob("shard-*"))
    began, rates = clock.now, watched_rates(monkeypatch)
    assert command(tmp_path, "--minutes", 6, "--resume") == 0
    assert 0.9 * 360 <= clock.now - began <= 1.1 * 360
    assert log_of(tmp_path)[-1]["step"] > first + 40
    assert max(rates) > 10 * rates[-1]
    assert sorted(tmp_path.rglob("shard-*")) == files
    assert command(tmp_path, "--resume") == 0, "without minutes it is done"


def test_the_learning_rate_takes_longer_strides_when_fewer_steps_are_left(grammar, monkeypatch):  # noqa: F811
    def rates_of(change: dict[int, int]) -> tuple[list[float], Progress]:
        with monkeypatch.context() as patch:
            rates = watched_rates(patch)
            model, _, directory = grammar
            run = Trainer(gradients_of(model, directory, OPTIONS), OPTIONS, Progress(40))

            def after(progress):
                progress.steps = change.get(progress.step, progress.steps)
                return False

            run.run(alone(run), after)
            return rates, run.progress

    whole, progress = rates_of({})
    assert (progress.place, progress.places) == (40, 40)
    halved, progress = rates_of({10: 25})
    assert len(halved) == 25
    assert progress.place == pytest.approx(40)
    assert halved[:10] == whole[:10]
    assert halved[10:] == pytest.approx(whole[10::2], rel=0.1, abs=1e-4)
    longer, progress = rates_of({10: 70})
    assert len(longer) == 70
    assert longer[-1] < 0.02 * max(longer)


def test_a_batch_that_is_cut_is_the_beginning_of_the_whole_one():
    model = Target(build("llama"))
    scripts = lambda: iter(
        [Part(Role.USER, (7 + i, 3)), Part(Role.ASSISTANT, limit=8 + i % 3)] for i in range(40)
    )
    whole = play(model, scripts(), 4, 60, mx.random.key(1))
    cut = play(model, scripts(), 4, 60, mx.random.key(1), enough=lambda answered: answered >= 50)
    by_number = {c.number: c for c in whole}
    assert 0 < len(cut) < len(whole)
    shorter = 0
    for c in cut:
        same = by_number[c.number]
        assert (c.tokens == same.tokens[: len(c.tokens)]).all()
        assert mx.array_equal(c.hidden, same.hidden[: len(c.tokens)])
        shorter += len(c.tokens) < len(same.tokens)
    assert shorter
    assert 50 <= sum(int((c.roles == Role.ASSISTANT).sum()) for c in cut) + 4 < 60


def tokens_in(directory, number: int) -> np.ndarray:
    return map_shard(shard_path(directory, number))["tokens"]


def test_data_end_with_the_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, column=1.0)
    options = DataOptions(data_tokens=10**6, rows=6, columns=200, answer_tokens=40)
    write = lambda directory, seconds: write_data(
        Target(build("llama")), TinyTokenizer(), directory, options,
        until=Deadline.after(seconds) if seconds is not None else NEVER,
    )  # fmt: skip
    began = clock.now
    written = write(tmp_path / "cut", 120)
    assert (written.ended, written.batches) == ("time", 1)
    assert clock.now - began <= 140, "and what it takes to try whether rows can be staggered"
    began = clock.now
    least = write(tmp_path / "least", 0)
    assert least.batches == 1, "something to learn from in any case"
    assert least.counts.tokens + 12 >= LEAST * 6
    assert least.counts.tokens < written.counts.tokens
    began = clock.now
    assert write(tmp_path / "least", 0) == least, "but not more"
    assert clock.now - began < 30
    first = tokens_in(tmp_path / "cut", 0)
    more = write(tmp_path / "cut", 270)
    assert more.batches == 2, "a third one would have had less than half of its time"
    assert (tokens_in(tmp_path / "cut", 0) == first).all()
    assert more.counts.tokens > written.counts.tokens


def test_a_report_with_time_enough_is_what_its_searches_find(tmp_path, tiny):
    assert command(tmp_path, "--steps", 2) == 0
    drafter = drafters.load_drafter(str(tmp_path), tiny)
    answers = report.held_out_answers(tmp_path / "training" / "data")[:2]
    whole = report.report(drafter, answers)
    assert whole.tokens == sum(len(answer.tokens) for answer in answers) == len(whole.drafts)
    assert not whole.left_out
    for shape, rates in whole.tokens_per_round.items():
        assert rates == replay.replay(drafter, answers, *shape).tokens_per_round
    assert (whole.recall == replay.recall(drafter, answers, report.BEAM_LENGTH - 1)).all()


def test_a_report_is_as_large_as_the_time_allows(monkeypatch):
    """Every search takes a second for an answer, and finds nothing."""
    monkeypatch.setattr(report, "SHAPES", (report.CHAIN, report.USUAL))
    shape = 4, len(replay.RECALL)
    missed = lambda self, answer: (np.full((len(answer.tokens), 4), replay.UNSCORED), [])
    monkeypatch.setattr(replay.Replayer, "of", missed)
    none = lambda self, answer: (np.zeros(shape), np.ones((4, 1)))
    monkeypatch.setattr(replay.Recaller, "of", none)
    clock = Clock(monkeypatch, answer=1.0)
    answers = [SimpleNamespace(tokens=np.zeros(10 + i, int)) for i in range(9)]
    drafter = SimpleNamespace(depths=4)
    for seconds, searches, took in ((0, 1, 1), (1, 1, 1), (2.25, 2, 3)):
        began = clock.now
        found = report.report(drafter, answers, Deadline.after(seconds))
        assert found.tokens == 10
        assert len(found.tokens_per_round) + (found.recall is not None) == searches
        assert clock.now - began == took
        assert found.left_out == [report.CHAIN]
        assert "There was no time for 1 x 5; --evaluate" in report.table(found)
    began = clock.now
    found = report.report(drafter, answers, Deadline.after(7.5))
    assert found.tokens == 10 + 11, "an answer counts with all searches or with none"
    assert not found.left_out
    assert clock.now - began == 8


def test_a_dry_run_says_how_minutes_will_be_spent(tmp_path, tiny, capsys):
    assert command(tmp_path / "out", "--minutes", 5000, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "--minutes 5000: " in said
    assert "tokens of answers, " in said
    assert "steps" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_when_minutes_cannot_be_kept(tmp_path, tiny, capsys):
    assert command(tmp_path / "out", "--minutes", 0.0001, "--dry-run") == 2
    said = capsys.readouterr().err.strip()
    assert "--minutes 0.0001 cannot be kept: in seconds, loading takes" in said
    assert "give --minutes " in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_benchmark_of_heads_gives_each_its_minutes(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(heads, "reads_by_default", lambda layers: (0, 1))
    target = Target(tiny)
    target.taps = (0, 1)
    part = part_path(tmp_path / "training" / "data", 0)
    options = DataOptions(data_tokens=200, rows=8, columns=96, answer_tokens=24)
    write_data(target, TinyTokenizer(), part, options)
    clock = Clock(monkeypatch, step=5.0)
    began = clock.now
    variant = "head=medusa draft_vocab=48 candidates=64 windows=4"
    words = ["train", str(tmp_path), "--minutes", "2", "--jobs", "1", "--variant", variant]
    assert heads.main(words) == 0
    assert 0.9 * 120 <= clock.now - began <= 1.1 * 120
    (facts,) = tmp_path.glob("heads/*/facts.json")
    assert json.loads(facts.read_text())["steps"] > 10
