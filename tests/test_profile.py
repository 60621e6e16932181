"""Profiles in the user's cache: one that does not fit is ignored with one line."""

import json
import logging
import os
from dataclasses import replace

import pytest

from families import build
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.pricing import profile as profiles
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.pricing.profile import Profile, identify, load, policy_for, profile_path, save
from redrafter_mlx.target.adapter import adapt
from support import generation, ids, random_drafter, tiny_prompt


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
    tables = [[[[1.0] * 8] * 4] * 2, [[[0.5] * 8] * 4] * 2]
    return Profile(identify(adapt(model), drafter), curve, drafts, *tables, {"note": "a"})


def test_what_is_saved_is_loaded(profile):
    path = save(profile)
    assert load(profile.identity) == profile
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


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
    assert "redrafter_mlx.tune" in line
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
        edited(lambda content: content.update(format=99)),
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


def test_a_profile_is_used_and_what_was_learned_is_kept(model, drafter, profile):
    save(profile)
    options = DraftOptions(beam_width=4, beam_length=6)
    policy = policy_for(adapt(model), drafter, options, 0.0)
    assert policy.costs.at(10, 2).tolist() == pytest.approx([0, 0.01, 0.02])
    assert policy.draft_costs.of(Setting(4, 5)) == 0.002
    assert policy.calibration.predicted.shape == (2, 5, 8)
    assert policy_for(adapt(model), drafter, options, 0.0) is policy
    warm = policy_for(adapt(model), drafter, options, 0.8)
    assert warm is not policy
    assert warm.costs is policy.costs


def test_passes_are_known_from_a_profile_of_another_drafter(model, profile, caplog):
    other = random_drafter(model, seed=7)
    path = save(replace(profile, identity={**profile.identity, "model": "another"}))
    (path.parent / "broken.json").write_text("nonsense")
    assert policy_for(adapt(model), other, DraftOptions(), 0.0).costs.at(10, 2) is None
    save(profile)
    policy = policy_for(adapt(model), random_drafter(model, seed=8), DraftOptions(), 0.0)
    assert policy.costs.at(10, 2).tolist() == pytest.approx([0, 0.01, 0.02])
    assert policy.draft_costs.of(Setting(4, 5)) == 0.0
    assert not policy.calibration.predicted.any()
    assert caplog.records == []


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
