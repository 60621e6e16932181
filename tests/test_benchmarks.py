"""Benchmarks: README's tables are those of the results, bounds and predictions are right."""

import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import decay, first_run, machines, prompts, ratios, report, tables
from families import build
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.tree import Candidates
from support import ScriptedDrafter, generation, ids, tiny_prompt

RUN = {"category": "qa", "temp": 0.0, "decode_seconds": 2.0, "first_seconds": 0.1}


def run(method, rate, prompt="a", tokens=20, rounds=20, sizes=None, draft=0.0, **more):
    return {
        **RUN, "prompt": prompt, "method": method, "tokens": tokens, "rate": rate,
        "rounds": rounds, "draft_seconds": draft, "verify_seconds": 1.9 - draft,
        "sizes": sizes or {"1": rounds}, **more,
    }  # fmt: skip


@pytest.fixture
def result():
    """Plain rounds of 0.1 s; passes of 4 rows take 0.15 s."""
    return {
        "kind": "speed",
        "machine": dict.fromkeys(
            ("commit", "date", "chip", "mlx", "device", "blas", "mlx_lm"), "x"
        ),
        "settings": {
            "prompts": "p.jsonl", "per_category": 1, "max_tokens": 20, "repeats": 1, "model": "m"
        },
        "memory": {"prompt_tokens": 9, "peak": 3e6, "target": 1e6, "head": 1e6, "kv_cache": 5e5},
        "differences": [],
        "costs": [{"prompt": "a", "context": 9, "seconds": {"1": 0.1, "4": 0.15, "8": 0.3}}],
        "runs": [
            run("mlx-lm", 10.0),
            run("plain", 9.9),
            run("budget auto", 12.0, rounds=10, sizes={"4": 8, "6": 2}, draft=0.05),
        ],
    }  # fmt: skip


def test_the_pages_have_the_tables_of_the_results():
    """Made by: python -m benchmarks.report."""
    for path, text in report.pages().items():
        assert path.read_text(encoding="utf-8") == text


def test_the_bound_counts_each_round_at_the_cost_of_its_tree(result):
    auto = result["runs"][2]
    seconds = 8 * 0.15 + 2 * 0.225 + 0.05
    costs = result["costs"][0]["seconds"]
    for keys in (costs, {int(n): s for n, s in costs.items()}):
        assert ratios.bound(auto, keys) == pytest.approx(20 * 0.1 / seconds)
    assert ratios.efficiency(result, "budget auto") == pytest.approx(1.2 / (20 * 0.1 / seconds))
    assert ratios.efficiency(result, "plain") is None


def test_the_tables_of_a_run(result):
    tables = report.speed_tables(result, "NAME.json")
    assert "| budget auto | 1.200 (1.20-1.20) | 2.00 | 102.0% |" in tables
    assert "| qa | 0.99 (1.00) | 1.20 (2.00) |" in tables
    assert "| geometric mean | 0.99 | 1.20 |" in tables


def test_auto_is_held_against_the_best_fixed_budget(result):
    assert "best fixed" not in report.speed_tables(result, "NAME.json")
    result["runs"] += [run("budget 4", 8.0, sizes={"4": 20}), run("beams 2x3", 12.5)]
    assert "budget auto reaches 96.0% to 96.0%" in report.speed_tables(result, "NAME.json")


def test_unshared_beams_cost_a_row_for_each_token():
    from benchmarks.speed import UnsharedBeams

    found = Candidates(
        0, np.array([5, 6, 7, 8]), np.array([-1, -1, 0, 0]), np.log([0.5, 0.4, 0.3, 0.2]),
        np.array([2, 3]),
    )  # fmt: skip
    tree = UnsharedBeams(2, 3, 0).tree(found)
    assert len(tree) == 1 + 2 * 2
    shared = FixedBudget(2, 3, 0).tree(found)
    assert tree.tokens[: len(shared)].tolist() == shared.tokens.tolist()


def test_tasks_are_means_of_their_prompts(result):
    """A median of three prompts would be one of them."""
    for prompt, rate in (("b", 24.0), ("c", 40.5)):
        result["runs"] += [run("mlx-lm", 10.0, prompt), run("budget auto", rate, prompt)]
    mean = (1.2 * 2.4 * 4.05) ** (1 / 3)
    assert ratios.category_ratios(result, "budget auto") == {"qa": pytest.approx(mean)}


def test_the_summary_has_a_row_for_each_drafter_and_its_command(result):
    result["runs"].append(run("budget auto", 16.0, category="rag", prompt="b", rounds=5))
    result["runs"].append(run("mlx-lm", 10.0, category="rag", prompt="b"))
    lines = report.summary([("NAME.json", result)]).splitlines()
    assert "| 1 | budget auto | 2 of p, 20 tokens | **1.39** | 1.20 to 1.60 | 2.67 |" in lines
    assert not any("plain" in line for line in lines)
    assert lines[-1].startswith("1. `python -m benchmarks.speed --prompts p.jsonl --per-category 1")


def test_the_summary_has_a_table_for_each_machine(result):
    result["machine"]["chip"] = "M9"
    lines = report.summary([("a.json", result), ("a.more.json", result), ("b.json", result)])
    lines = lines.splitlines()
    assert [line for line in lines if line.endswith(": M9")] == ["a: M9", "b: M9"]
    rows = [line[:5] for line in lines if "| budget auto |" in line]
    assert rows == ["| 1 |", "| 2 |", "| 3 |"]
    assert "--output b.json`" in lines[-1]


def test_texts_without_a_second_token_have_no_rate(result):
    """A model that ends at once: nothing was decoded that could be timed."""
    for method in ("mlx-lm", "plain", "budget auto"):
        result["runs"].append(run(method, None, prompt="b", tokens=1, rounds=1))
    result["costs"].append({"prompt": "b", "context": 3, "seconds": {"1": 0.1}})
    assert ratios.ratios(result, "budget auto").keys() == {"a"}
    assert "1.20" in report.speed_tables(result, "NAME.json")


def test_temperatures_have_tables_of_their_own(result):
    result["runs"] += [{**r, "temp": 1.0} for r in result["runs"]]
    tables = report.speed_tables(result, "NAME.json")
    assert tables.index("Greedy:") < tables.index("Temperature 1:")


def test_the_picture_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert report.draw_speed(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_prediction_is_the_best_of_all_budgets():
    tokens = {2: 1.6, 4: 2.2, 8: 2.6}
    costs = {1: 1.0, 2: 1.1, 4: 1.3, 8: 3.0}
    assert machines.predict(tokens, costs, 0.1) == (4, pytest.approx(2.2 / 1.4))
    assert machines.predict(tokens, {1: 1.0, 2: 2.0}, 0.1)[1] < 1


def test_tiles_reread_the_weights():
    costs = machines.tiles(20, 13, 5)
    assert [costs[n] for n in (1, 5, 6, 10, 11, 12, 13, 20)] == [1, 1, 2, 2, 3, 3, 3, 3]


def test_published_curves_are_curves():
    for machine in machines.PUBLISHED:
        assert machines._curve(machine.curve).rows[0] == 1


@pytest.fixture
def acceptance(tmp_path):
    yields = {"best": {"2": 1.5, "4": 2.0, "16": 2.6}, "chain": {"2": 1.5, "4": 1.9}}
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps({"kind": "acceptance", "temps": {"0": {"all": yields}}}))
    return path


def test_other_machines_on_paper(acceptance, capsys):
    assert machines.main([str(acceptance), "--curve", "1:1 2:1.1 4:1.2 16:2"]) == 0
    out = capsys.readouterr().out
    assert f"{2.0 / 1.3:.2f}x at budget 4" in out
    assert machines.main([str(acceptance)]) == 0
    assert "do not speculate" in capsys.readouterr().out


def test_how_well_it_predicts(result):
    (line,) = [line for line in machines.against(result).splitlines() if "budget auto" in line]
    assert "1.176 | 1.200 | 1.020" in line


@pytest.mark.parametrize("curve", ["", "1", "1:x", "2:1", "1:1 2:-1", "1:0"])
def test_a_curve_that_is_none_is_one_line(acceptance, curve):
    with pytest.raises(SystemExit, match="--curve"):
        machines.main([str(acceptance), "--curve", curve])


def test_a_document_of_another_kind_is_one_line(acceptance):
    with pytest.raises(SystemExit, match=r"benchmarks\.speed writes"):
        machines.main([str(acceptance), "--against", str(acceptance)])


@pytest.mark.parametrize("content", [None, "", "\n", "{}", "[1]", "not json", '{"category": "a"}'])
def test_missing_prompts_are_one_line(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="--prompts") as caught:
        prompts.read(path, 2)
    assert "\n" not in str(caught.value)


def test_own_prompts_are_read():
    found = prompts.read(prompts.OWN, 1)
    assert len({prompt.category for prompt in found}) == len(found) > 3


def test_spread_is_the_middle_half():
    assert report._middle(np.arange(1.0, 6.0)) == "3.000 (2.00-4.00)"


def first_run_document() -> dict:
    where = dict.fromkeys(("commit", "date", "chip", "mlx", "device"), "x")
    run = lambda name, auto, fixed, texts=1: {
        "id": name, "category": name, "tokens": 9, "texts": texts, "look_seconds": 0.9,
        "speeds": {"plain": 10.0, "auto": auto, "auto, second run": 12.0, "--budget 8": fixed},
    }  # fmt: skip
    runs = [run("readme", 30.0, 1.0), run("a", 16.0, 20.0), run("b", 9.0, 5.0, texts=2)]
    return {"kind": "first_run", "machine": where, "settings": {"model": "m"}, "runs": runs}


def test_the_table_of_first_runs():
    """The README's prompt has a row and no part in the means; a text may be best left plain."""
    table = tables.first_run_tables(first_run_document(), "x.json")
    assert "| readme | 9 | 3.00 | 1.20 | 0.10 | 0.9 s |" in table
    assert f"| **{(1.6 * 0.9) ** 0.5:.3f}** |" in table
    each, best = ((16 / 20) * (9 / 10)) ** 0.5, (1.6 * 0.9) ** 0.5 / (2.0 * 0.5) ** 0.5
    assert f"auto: {each:.3f} of the best of plain and fixed settings for each text" in table
    assert f"{best:.3f} of the best for all (--budget 8), 0.90 of plain" in table
    assert "Texts that differ between methods: b." in table
    assert "Whole processes" not in table, "of results that have no such times"


def test_whole_processes_are_compared_too():
    result = first_run_document()
    for i, run in enumerate(result["runs"]):
        run["seconds"] = dict(zip(run["speeds"], (6.0 + i, 4.0, 5.0, 8.0), strict=True))
    auto, second, fixed = (((7 * 8) ** 0.5) / seconds for seconds in (4, 5, 8))
    assert (
        "Whole processes, of 7.5 s with plain decoding (median), over it: "
        f"auto {auto:.3f}, auto, second run {second:.3f}, --budget 8 {fixed:.3f}."
    ) in tables.first_run_tables(result, "x.json")


def test_a_first_run_knows_nothing_and_the_second_what_it_left(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    here, seen = first_run.Machine(tmp_path / "root"), []

    def run(words):
        left = [here.cache / name for name in ("profiles", "probes")]
        assert left[0].exists() == left[1].exists()
        seen.append((list(words)[-1], left[0].exists()))
        if "--no-draft" not in words:
            for each in left:
                each.mkdir(exist_ok=True)
        return {
            "tokens": [1, 2],
            "generation_tps": 10.0,
            "tokens_per_round": 1.5,
            "mean_nodes": 2.0,
            "seconds": 3.0,
        }

    monkeypatch.setattr(here, "run", run)
    flags = Namespace(model="m", max_tokens=2, temp=0.0, drafter="auto", fixed=["--budget 8"])
    for _ in range(2):
        found = first_run.measure(here, "Why?", flags)
    plain, first, second, fixed = ("--no-draft", "auto", "auto", "8")
    assert [seen[i] for i in (5, 6, 7)] == [(plain, False), (first, False), (second, True)]
    assert [word for word, _ in seen[5:]] == [plain, first, second, fixed, plain]
    assert found["texts"] == 1
    assert found["seconds"] == dict.fromkeys(found["speeds"], 3.0)
    assert (here.cache / "models").is_dir()


def test_a_drafter_that_gets_worse_along_a_text_is_seen(monkeypatch):
    """And that all drafted the same one."""
    model, prompt = build("llama"), tiny_prompt(9)
    sampled = {"temp": 0.8, "seed": 3, "max_tokens": 80}
    text = ids(generation(model, prompt, **sampled))
    other = [(token + 1) % 97 for token in text[40:]]
    drafters = {
        "steady": ScriptedDrafter(prompt + text, right=4),
        "forgets": ScriptedDrafter(prompt + text[:40] + other, right=4),
    }
    bench = Namespace(model=model, drafters=drafters, encode=lambda text: prompt)
    monkeypatch.setattr(decay, "Bench", lambda *args: bench)
    flags = Namespace(model="tiny", drafters=list(drafters), tokens=80, stretch=20)
    result = decay.measure(flags)
    assert result["same_text"]
    assert result["tokens_per_round"]["steady"] == [5.0] * 4
    assert result["tokens_per_round"]["forgets"] == [5.0, 5.0, 1.0, 1.0]
    assert "| forgets | 5.00 | 5.00 | 1.00 | 1.00 |" in tables.decay_tables(result, "x.json")
