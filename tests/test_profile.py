"""Profiles in the user's cache: one that does not fit is ignored with one line."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from families import build
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.measuring import profile as profiles
from redrafter_mlx.measuring.knowledge import Knowledge, is_far, knowledge_of
from redrafter_mlx.measuring.profile import Profile, identify, load, profile_path, save
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.rounds.tree import Candidates
from redrafter_mlx.target.adapter import adapt
from simulated import answer
from support import generation, ids, random_drafter, tiny_prompt

FULL = Setting(4, 5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def drafter(model):
    return random_drafter(model)


@pytest.fixture
def profile(model, drafter):
    curve = CostCurve([10, 100], [1, 2, 16], [[0.01, 0.02, 0.03], [0.02, 0.03, 0.05]])
    drafts = {Setting(4, 5): 0.002, Setting(1, 2): 0.001}
    return Profile(
        identify(adapt(model), drafter), curve, drafts, {"4x5 at 0.0": experience()}, {"note": "a"}
    )


def experience(accepted: float = 0.5) -> Experience:
    chain = Candidates(
        0, np.zeros(2, int), np.array([-1, 0]), np.array([-0.5, -1.25]), np.array([])
    )
    return Experience(FULL, np.ones((2, 4, 8)), np.full((2, 4, 8), accepted), [chain])


def test_what_is_saved_is_loaded(profile):
    path = save(profile)
    assert load(profile.identity).as_dict() == profile.as_dict()
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.name + ".lock"]


def test_no_profile_is_nothing_to_talk_about(profile, caplog):
    assert load(profile.identity) is None
    assert caplog.records == []


def ignored(identity, caplog) -> str:
    """The one line with which a stored profile is ignored."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        assert load(identity) is None
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line
    assert "ignored the profile" in line
    return line


@pytest.mark.parametrize("key", ["mlx", "blas"])
def test_a_stale_profile_is_ignored(profile, caplog, key):
    old = replace(profile, identity={**profile.identity, key: "0.1"})
    save(old)
    assert f"its {key} is 0.1, here it is {profile.identity[key]}" in ignored(
        profile.identity, caplog
    )


@pytest.mark.parametrize("key", ["machine", "model", "dtype", "drafter"])
def test_a_foreign_profile_is_ignored(profile, caplog, key):
    """One that was copied here from elsewhere."""
    foreign = replace(profile, identity={**profile.identity, key: "another"})
    assert profile_path(foreign.identity) != profile_path(profile.identity)
    save(profile)  # makes the directory
    save(foreign).replace(profile_path(profile.identity))
    assert f"its {key} is another" in ignored(profile.identity, caplog)


def edited(change):
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        edited(lambda content: content["curve"]["seconds"][0].__setitem__(2, 0.001)),
        edited(lambda content: content.pop("drafts")),
        edited(lambda content: content.update(format=3)),
        edited(lambda content: content["experiences"]["4x5 at 0.0"]["samples"][0][0].append(7)),
        edited(lambda content: content.update(checksum=5)),
    ],
)
def test_an_edited_or_damaged_profile_is_ignored(profile, caplog, damage):
    path = save(profile)
    path.write_text(damage(path.read_text()))
    ignored(profile.identity, caplog)


def test_a_profile_that_is_a_directory_is_ignored(profile, caplog):
    profile_path(profile.identity).mkdir(parents=True)
    ignored(profile.identity, caplog)


def test_a_checksum_does_not_make_sense_of_nonsense(profile, caplog):
    path = save(profile)
    content = json.loads(path.read_text())
    content["curve"]["seconds"][0][0] = -1.0
    del content["checksum"]
    content["checksum"] = profiles._checksum(content)
    path.write_text(json.dumps(content))
    assert "positive" in ignored(profile.identity, caplog)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_an_oserror(profile, cache):
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(PermissionError):
        save(profile)


def test_a_cache_that_is_a_file_is_an_oserror(profile, cache):
    cache.write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        save(profile)
    assert cache.read_text() == ""


def test_the_identity_knows_weights_and_types(model):
    target = adapt(model)
    first, second = random_drafter(model, seed=1), random_drafter(model, seed=2)
    assert identify(target, first) == identify(target, first)
    changed = {
        key
        for key, value in identify(target, second).items()
        if value != identify(target, first)[key]
    }
    assert changed == {"drafter"}
    assert identify(target, None)["drafter"] == "none"


def known(model, drafter, temp=0.0, prompt=(1, 2, 3), passes=lambda rows: 0.01 * rows, **options):
    """What a process knows after a prompt, and its policy."""
    target = adapt(model)
    found = Knowledge(target, drafter)
    drafter.reset()
    context = target.prefill(prompt, chunk=512)
    policy = found.policy(DraftOptions(**options), temp)
    answer(found.survey(DraftOptions(**options), context), passes, lambda setting: 0.003)
    return found, policy


def test_a_profile_is_used(model, drafter, profile, caplog):
    save(profile)
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        found, policy = known(model, drafter)
    assert caplog.records == [], "nothing was missing, so nothing was measured"
    assert policy.costs.at(10, 2).tolist() == pytest.approx([0, 0.01, 0.02])
    assert policy.draft_costs.of(FULL) == 0.002
    assert policy.calibration.accepted.sum() == pytest.approx(32)
    assert len(policy.samples) == 1
    assert found.policy(DraftOptions(), 0.04) is policy
    warm = found.policy(DraftOptions(), 0.8)
    assert warm.costs is policy.costs
    assert not warm.calibration.predicted.any(), "another temperature"
    wide = found.policy(DraftOptions(beam_width=8, beam_length=6), 0.0)
    assert wide.calibration.predicted.shape == (2, 5, 8)


def test_what_is_missing_is_measured_once_and_said(model, drafter, caplog):
    """In rounds whose tokens count, after which the line is said."""
    prompt = tiny_prompt()
    plain = ids(generation(model, prompt, max_tokens=60))
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        first, second = (
            generation(model, prompt, drafter, max_tokens=60, draft=DraftOptions())
            for _ in range(2)
        )
        tokens = first.turns()
        told = [next(tokens) for _ in range(20)]
        assert caplog.records == [], "not in the middle of the text"
        assert [token.id for token in [*told, *tokens] if token is not None] == plain
        assert ids(second) == plain
    (line,) = [r.getMessage() for r in caplog.records]
    assert re.fullmatch(r"measured once, in \d+ rounds, what drafts and passes cost here", line)
    stored = load(identify(adapt(model), drafter))
    assert stored.curve.contexts == [len(prompt) - 1]
    assert {1, 2, 4, 8, 16} <= set(stored.curve.rows)
    measured = knowledge_of(adapt(model), drafter)._draft_costs.measured
    assert set(measured) == {FULL, Setting(1, 5), Setting(1, 2)}


def test_a_survey_of_a_machine_that_was_busy_is_not_kept(model, drafter, caplog):
    """Seen with another process on all cores: 114 ms for a row, 581 for two, never tried again."""
    busy = {1: 0.114, 2: 0.581, 4: 0.581, 8: 2.66, 16: 3.55}
    quiet = {1: 0.075, 2: 0.094, 4: 0.101, 8: 0.104, 16: 0.133}
    found, policy = known(model, drafter, passes=busy.__getitem__)
    found.keep(20)
    assert "something else is using this machine" in caplog.text
    assert load(found._identity) is None
    context = adapt(model).prefill([1, 2, 3], chunk=512)
    answer(found.survey(DraftOptions(), context), quiet.__getitem__, lambda setting: 0.003)
    assert policy.costs.at(3, 8)[8] == pytest.approx(0.104)
    found.keep(20)
    assert load(found._identity).curve.seconds[0][:2] == pytest.approx([0.075, 0.094])


def test_a_busy_machines_profile_is_measured_anew(model, drafter, profile):
    curve = CostCurve([3], [1, 2, 16], [[0.1, 0.7, 1.4]])
    save(replace(profile, curve=curve))
    found, policy = known(model, drafter)
    assert not policy.costs.curve.is_disturbed
    assert policy.calibration.accepted.sum() == pytest.approx(32), "what drafts are worth is kept"
    found.keep(20)
    assert not load(found._identity).curve.is_disturbed


def test_a_much_longer_prompt_is_looked_at_again(model, drafter, profile, caplog):
    save(profile)
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        found, policy = known(model, drafter, prompt=[1 + i % 7 for i in range(300)])
        found.keep(310)
    assert "what passes cost" in caplog.text
    assert policy.costs.curve.contexts == [10, 100, 299]
    assert load(profile.identity).curve.contexts == [10, 100, 299]


@pytest.mark.parametrize(
    ("one", "other", "far"),
    [(0, 256, False), (0, 257, True), (100, 20, False), (150, 300, False), (149, 300, True),
     (600, 1200, False), (600, 1201, True)],
)  # fmt: skip
def test_contexts_are_far_apart_beyond_twice_the_shorter(one, other, far):
    assert is_far(one, other) is is_far(other, one) is far


@pytest.mark.parametrize(("length", "corrected"), [(20, [10, 100]), (240, [10, 100]), (300, [])])
def test_what_was_seen_in_a_text_corrects_contexts_near_it(
    model, drafter, profile, length, corrected
):
    """1.2 times as dear: known after the last token, kept for contexts like the text's."""
    save(profile)
    found, policy = known(model, drafter)
    for _ in range(50):
        for rows, seconds in ((1, 0.01), (2, 0.02)):
            policy.costs.observe(rows, 10, 1.2 * seconds)
    found.keep(length)
    stored = load(profile.identity).curve
    for context, before, after in zip(
        stored.contexts, profile.curve.seconds, stored.seconds, strict=True
    ):
        factor = 1.2 if context in corrected else 1.0
        np.testing.assert_allclose(after, factor * np.array(before), rtol=1e-3)


def test_what_a_head_brings_is_where_it_begins(model, drafter):
    drafter.experience = {0.0: experience(), 1.0: experience(0.25)}
    accepted = [known(model, drafter, temp)[1].calibration.accepted.sum() for temp in (0.0, 1.0)]
    assert accepted == pytest.approx([32, 16])
    policy = known(model, drafter, 0.6)[1]
    assert policy.calibration.accepted.sum() == pytest.approx(0.25 * 8 * 3), "a prior's weight"
    assert len(policy.samples) == 1


def test_two_processes_lose_nothing(model, drafter, profile):
    """Both began with the same profile; each leaves what it learned."""
    save(profile)
    pair = [known(model, drafter) for _ in range(2)]
    for number, (found, policy) in enumerate(pair):
        for _ in range(5):
            policy.calibration.pass_round()
            policy.calibration.predicted[0, number] += 1.0
        policy.samples.add(experience().samples[0])
        found.keep(50)
        found.keep(50)  # once more changes nothing
    stored = load(profile.identity).experiences["4x5 at 0.0"]
    faded = Calibration.FADE ** np.array([10, 5])
    np.testing.assert_allclose(stored.predicted[0, 2:], faded[0], atol=1e-3)
    gained = stored.predicted[0, :2, 0] - faded[0]
    assert (gained > 4.9).all()
    assert len(stored.samples) == 3


def test_many_processes_at_once_lose_nothing(profile):
    save(profile)
    script = """
import sys
from dataclasses import replace
from redrafter_mlx.measuring.profile import load, update
import json
identity = json.loads(sys.argv[1])
for i in range(20):
    update(identity, lambda p: replace(p, summary={**p.summary, sys.argv[2] + str(i): 1}))
"""
    words = [sys.executable, "-c", script, json.dumps(profile.identity)]
    running = [subprocess.Popen([*words, name]) for name in "xyz"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(load(profile.identity).summary) == 1 + 60


def test_a_process_that_is_killed_corrupts_nothing(profile, tmp_path):
    save(profile)
    script = """
import json, sys
from dataclasses import replace
from redrafter_mlx.measuring.profile import update
identity, big = json.loads(sys.argv[1]), "x" * 1_000_000
print("ready", flush=True)
while True:
    update(identity, lambda p: replace(p, summary={"note": "b", "big": big}))
"""
    words = [sys.executable, "-c", script, json.dumps(profile.identity)]
    for _ in range(3):
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        process.stdout.readline()
        while load(profile.identity).summary.get("note") != "b":
            pass
        process.kill()
        process.wait()
        assert load(profile.identity) is not None
        save(profile)
    assert load(profile.identity).summary == {"note": "a"}


def test_a_cache_that_cannot_be_written_is_said_once(model, drafter, cache, caplog):
    cache.write_text("")
    found, _ = known(model, drafter)
    for _ in range(2):
        found.keep(50)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.startswith("what was learned cannot be kept: ")
    assert "REDRAFTER_MLX_CACHE" in line


def test_passes_are_known_from_a_profile_of_another_drafter(model, profile, caplog):
    path = save(replace(profile, identity={**profile.identity, "model": "another"}))
    (path.parent / "broken.json").write_text("nonsense")
    save(profile)
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        found, policy = known(model, random_drafter(model, seed=8))
        found.keep(50)
    assert policy.costs.at(10, 2).tolist() == pytest.approx([0, 0.01, 0.02])
    assert policy.draft_costs.of(FULL) != 0.002
    assert not policy.calibration.predicted.any()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("rounds, what drafts cost here")


def test_generation_with_a_bad_profile_says_so_once_and_gives_the_same_text(
    model, drafter, profile, caplog
):
    path = save(profile)
    path.write_text("nonsense")
    prompt = tiny_prompt()
    plain = ids(generation(model, prompt))
    for _ in range(2):
        assert ids(generation(model, prompt, drafter, draft=DraftOptions())) == plain
    assert sum("ignored the profile" in record.getMessage() for record in caplog.records) == 1
