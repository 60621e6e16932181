"""auto on paper: recorded drafts, priced by a curve, played through the policy."""

import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import policy as bench
from benchmarks.tables import policy_tables
from redrafter_mlx.drafters.beam_search import collect
from redrafter_mlx.pricing.curve import CostCurve, LiveDraftCosts, Setting
from redrafter_mlx.pricing.policy import settings_within
from redrafter_mlx.rounds.tree import Candidates

FULL = bench.FULL
COSTS = bench.Costs(
    CostCurve([0], [1, 64], [[1.0, 1.63]]),  # 0.01 for each row more
    LiveDraftCosts({setting: 0.02 * (setting.length - 1) for setting in settings_within(FULL)}),
    max_gram=0.0,
)


def nothing(root: int) -> Candidates:
    none = np.array([], int)
    return Candidates(root, none, none, np.array([]), none)


def chain(root: int, tokens: list[int], prob: float) -> Candidates:
    """Tokens in a row, each as likely."""
    n = np.arange(len(tokens))
    return Candidates(root, np.array(tokens, int), n - 1, (n + 1) * np.log(prob), n[-1:])


def text(tokens: int, right: bool, category: str = "qa") -> bench.Text:
    """The token i follows i - 1; the head always says the next four, or always others."""
    head = [
        chain(i, [i + k + (0 if right else 500) for k in range(1, 5)], 0.9) for i in range(tokens)
    ]
    return bench.Text(category, 100, head, [nothing(i) for i in range(tokens)])


def play(found: bench.Text, rounds_of: int = 1) -> bench.Played:
    policy = bench.new_policy(COSTS, None, bench.HEAD)
    paper = bench.Paper(COSTS, noise=0.0, seed=0)
    for _ in range(rounds_of):
        played = paper.play(policy, found, bench.HEAD)
    return played


def test_a_fixed_setting_yields_what_can_be_counted():
    """100 tokens: rounds of 5, at one pass of 5 rows and a draft of 4 steps."""
    speeds = bench.fixed_speeds(text(101, right=True), bench.HEAD, COSTS)
    assert speeds[Setting(1, 5)][5] == pytest.approx(101 / (21 * (1.04 + 0.08)))
    assert speeds[Setting(1, 2)][2] == pytest.approx(101 / (51 * (1.01 + 0.02)))
    assert speeds[Setting(1, 2)][1] == 1.0
    useless = bench.fixed_speeds(text(100, right=False), bench.HEAD, COSTS)
    assert useless[Setting(1, 5)][5] == pytest.approx(1 / (1.04 + 0.08))


def test_auto_comes_near_the_best_of_them():
    best = max(s.max() for s in bench.fixed_speeds(text(400, True), bench.HEAD, COSTS).values())
    played = play(text(400, right=True), rounds_of=2)
    assert 0.95 * best < played.speed <= best + 1e-9
    assert sum(played.nodes) > 4 * len(played.nodes)


def test_auto_leaves_a_useless_drafter():
    played = play(text(400, right=False))
    assert 0.95 < played.speed < 1
    assert played.settings.count(None) > 100


def test_a_narrower_search_is_part_of_the_full_one():
    rng = np.random.default_rng(0)
    width, length = FULL
    scored = width + width * width * (length - 2)
    survivors = np.stack([rng.permutation(width) for _ in range(length - 1)])
    logprobs = -np.arange(scored, dtype=float)
    full = collect(0, np.arange(scored) % 7 + np.arange(scored), logprobs, survivors)
    assert bench.narrowed(full, FULL) is full
    for setting in settings_within(FULL):
        found = bench.narrowed(full, setting)
        assert found.depths.max() < setting.length
        paths = lambda c: {tuple(walk(c, i)) for i in range(len(c.tokens))}
        assert paths(found) <= paths(full)


def walk(candidates: Candidates, node: int) -> list[int]:
    tokens = []
    while node >= 0:
        tokens.append(int(candidates.tokens[node]))
        node = candidates.parents[node]
    return tokens[::-1]


def test_the_table_has_auto_beside_the_best_fixed_setting_of_each_task():
    flags = Namespace(orders=1, noise=0.0, seed=0, each=False)
    texts = [text(100, right=True), text(60, right=False, category="rag")]
    result = bench.compare(texts, COSTS, None, flags, bench.HEAD)
    assert result["qa"]["best"] > 3 > 1 == result["rag"]["best"]
    assert result["rag"]["setting"] == "plain"
    settings = {"prompts": "p.jsonl", "model": "m"}
    where = dict.fromkeys(("commit", "date", "chip", "mlx", "device"), "x")
    document = {"kind": "policy", "machine": where, "settings": settings}
    table = policy_tables({**document, "speeds": {bench.HEAD: result}}, "NAME.json")
    assert f"| qa | {result['qa']['auto']:.3f} | {result['qa']['best']:.3f} (" in table
    assert result["all"] | {"unseen": 0} == result["prompts from 0 tokens on"] | {"unseen": 0}


def test_the_best_of_the_others_is_no_better_than_the_best_known_afterwards():
    """Two texts, each with a setting of its own, and one that does for both."""
    speeds = [np.array([1.0, 1.0, 2.0, 1.5, 0.5]), np.array([1.0, 1.0, 0.5, 1.5, 2.0])]
    found = bench.beside_fixed([1.4, 1.6], [{FULL: speed} for speed in speeds])
    assert found["setting"] == "3 of 4x5"
    assert found["best"] == pytest.approx(1.5)
    assert found["unseen"] == pytest.approx(0.5), "each gets what is best in the other"


def test_a_recording_survives_json():
    before = text(3, right=True)
    after = bench.Text.from_dict(json.loads(json.dumps(before.as_dict())))
    assert (after.category, after.context) == ("qa", 100)
    for kind in ("head", "max_gram"):
        for old, new in zip(getattr(before, kind), getattr(after, kind), strict=True):
            assert new.root == old.root
            for name in ("tokens", "parents", "logprobs", "beams", "always"):
                np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
                assert getattr(new, name).dtype.kind == getattr(old, name).dtype.kind
