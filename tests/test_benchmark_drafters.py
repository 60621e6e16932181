"""benchmarks.drafters: what it runs, and what its tables say."""

import json
from pathlib import Path

from benchmarks import drafters, drafters_table
from benchmarks.prompts import read
from benchmarks.report import TABLES
from test_generate_command import tiny  # noqa: F401

COPY_EDIT = Path(drafters.__file__).parent / "copy_edit.jsonl"


def run_of(method, prompt, category, rate, **counts):
    counts = {"tokens": 30, "rounds": 10, "nodes": 40, "accepted_at": [10, 10]} | counts
    return {
        "prompt": prompt,
        "category": category,
        "method": method,
        "baseline": "plain",
        "rate": rate,
        "draft_seconds": 0.1,
        "decode_seconds": 2.0,
        "draft_runs": [[20, 0.25]],
        **counts,
    }


RESULT = {
    "kind": "drafters",
    "machine": {"commit": "c", "date": "d", "chip": "x", "mlx": "0", "device": "cpu"},
    "settings": {
        "model": "demo",
        "prompts": "a/prompts.jsonl",
        "per_category": 2,
        "max_tokens": 30,
        "drafters": ["max_gram", "demo"],
    },
    "costs": [{"1": 0.1, "4": 0.2, "8": 0.3}] * 2,
    "differences": [],
    "runs": [
        run_of("plain", "a", "chat", 10.0),
        run_of("plain", "b", "copy", 10.0),
        run_of("max_gram", "a", "chat", 5.0),
        run_of("max_gram", "b", "copy", 20.0),
        run_of("max_gram", "b", "copy", 80.0),
        run_of("max_gram", "b", "copy", 45.0),
    ],
}


def test_speeds_are_ratios_to_plain_decoding_of_the_same_prompt():
    assert drafters_table.ratios(RESULT, "max_gram", ["chat", "copy"]) == [0.5, 4.5]


def test_the_table_holds_formulas_beside_measurements():
    """3 tokens a round for a draft of 0.1 passes: 3 / 1.1; with 4 rows at 2 passes: 3 / 2.1."""
    table = drafters_table.tables(RESULT, "result.json")
    assert "--prompts prompts.jsonl --per-category 2" in table
    assert table == TABLES["drafters"](RESULT, "result.json")
    (row,) = [line for line in table.splitlines() if line.startswith("| max_gram |")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["max_gram", "1.50", "3.00", "1.00, 1.00", "2.73", "1.43", "2.00", "10.00 ms"]
    assert "| chat | 0.50 |" in table
    assert "| copy | 4.50 |" in table
    assert "Texts that differ: none." in table


def test_methods_have_names_that_tell_them_apart():
    names = [
        str(drafters.Method("demo", rule, temp))
        for rule in ("match", "rejection", "typical")
        for temp in (0.0, 0.8)
    ]
    assert len(set(names)) == 6
    assert names[-1] == "demo typical (lossy) at 0.8"
    assert str(drafters.Method("demo", "typical", 0.8).baseline) == "plain at 0.8"


def test_a_run_from_prompts_to_tables(tiny, tmp_path, capsys):  # noqa: F811
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "result.json"
    lines = [{"id": i, "category": "c", "turns": ["the end " * 4]} for i in range(2)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", str(tiny / "chat"), "--prompts", str(prompts), "--output", str(output)]
    words += ["--drafters", "max_gram", f"cascade:[{tiny / 'drafter'},max_gram]"]
    words += ["--rules", "match", "typical", "--temps", "0", "0.9", "--max-tokens", "8"]
    words += ["--cost-rows", "1", "4", "--cost-repeats", "2", "--cascade-k", "[[3,5],[0,0]]"]
    assert drafters.main([*words, "--budget", "16"]) == 0
    result = json.loads(output.read_text())
    methods = {run["method"] for run in result["runs"]}
    assert len(methods) == 2 + 2 * 2 * 2
    assert len(result["runs"]) == 2 * 2 * len(methods)
    assert result["differences"] == []
    table = capsys.readouterr().out
    assert all(f"| {method} |" in table for method in methods if not method.startswith("plain"))


def test_the_copy_edit_prompts():
    prompts = read(COPY_EDIT, 99)
    assert len(prompts) == len({prompt.id for prompt in prompts}) >= 8
    assert {prompt.category for prompt in prompts} == {"copy_edit"}
    assert all(200 < len(prompt.text) < 1200 for prompt in prompts)


def test_lookups_of_a_short_text(monkeypatch):
    monkeypatch.setattr(drafters, "LENGTHS", (10, 20))
    table = drafters.lookups()
    assert "| one token | 10 |" in table
    assert "| like words | 20 |" in table
