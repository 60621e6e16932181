"""The data stage: the same files however often it is killed, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import in_use
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training import data, shards
from redrafter_mlx.training.data import Counts, write_data
from redrafter_mlx.training.filters import loop_end
from redrafter_mlx.training.lockstep import Role
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.shards import (
    held_out_shards,
    map_shard,
    shard_count,
    shard_path,
    training_shards,
)
from support import TinyTokenizer

CHAT, PLAIN = TinyTokenizer(), TinyTokenizer(chat=False)
OWN = {"rows": 6, "columns": 200, "answer_tokens": 40}
ANSWERS = {"rows": 4, "columns": 64, "answer_tokens": 20}


def target(name="llama", seed=0):
    return Target(build(name, seed))


def write(directory, tokenizer=CHAT, model=None, progress=lambda _: None, **options):
    return write_data(model or target(), tokenizer, directory, DataOptions(**options), progress)


def files(directory):
    """Everything that was written, byte for byte."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != ".lock"}


def conversations(paths):
    """(tokens, roles) of every conversation."""
    for path in paths:
        file = map_shard(path)
        starts = file["starts"].tolist()[1:]
        yield from zip(
            np.split(file["tokens"], starts), np.split(file["roles"], starts), strict=True
        )


def everything(directory):
    return list(conversations([*training_shards([directory]), *held_out_shards([directory])]))


def prompts(tmp_path, count=30, name="prompts.jsonl"):
    draw = np.random.default_rng(0)
    path = tmp_path / name
    lines = [
        json.dumps({"prompt": "".join(chr(c) for c in draw.integers(65, 90, 3 + i % 20))})
        for i in range(count)
    ]
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.mark.parametrize("kind", ["chat", "plain", "given"])
def test_a_run_in_pieces_leaves_the_files_of_an_uninterrupted_one(tmp_path, kind):
    options = {"chat": OWN, "plain": ANSWERS, "given": ANSWERS}[kind]
    if kind == "given":
        options = {**options, "data": str(prompts(tmp_path))}
    tokenizer = PLAIN if kind == "plain" else CHAT
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    first = write(whole, tokenizer, data_tokens=500, **options)
    assert first.batches > 2
    for goal in (1, 150, 500):
        last = write(pieces, tokenizer, data_tokens=goal, **options)
    assert last == first
    assert files(pieces) == files(whole)


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import test_training_data as t
    left = int(sys.argv[2])
    def kill(progress):
        if progress.batches == left and progress.share > 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
    t.write(Path(sys.argv[1]), progress=kill, data_tokens=300, **t.OWN)
"""


def test_a_killed_run_loses_only_the_batch_under_way(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, data_tokens=300, **OWN)
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{root.parent}{os.pathsep}{root}"}
    script = "import redrafter_mlx\n" + textwrap.dedent(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-c", script, str(killed), "1"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert shard_count(killed) == 1
    write(killed, data_tokens=300, **OWN)
    assert files(killed) == files(whole)


def test_a_file_left_behind_half_written_is_written_over(tmp_path):
    write(tmp_path, data_tokens=1, **OWN)
    before = files(tmp_path)
    (tmp_path / ".shard-00001.partial.safetensors").write_bytes(b"half")
    shards.held_out_path(tmp_path, 1).write_bytes(b"half")  # its shard never came
    assert shard_count(tmp_path) == 1
    assert len(held_out_shards([tmp_path])) == 1
    assert write(tmp_path, data_tokens=500, **OWN).batches > 1
    assert files(tmp_path).items() >= {k: v for k, v in before.items() if "data" not in k}.items()
    assert ".shard-00001.partial.safetensors" not in files(tmp_path)
    assert everything(tmp_path)


def test_counts_are_those_of_the_shards(tmp_path):
    seen = []
    written = write(tmp_path, progress=seen.append, data_tokens=300, **OWN)
    kept = everything(tmp_path)
    assert written.ended == "tokens"
    assert written.counts.conversations == len(kept)
    assert written.counts.tokens == sum((roles == Role.ASSISTANT).sum() for _, roles in kept)
    assert written.counts.tokens >= 300
    manifest = json.loads((tmp_path / "data.json").read_text("utf-8"))
    assert Counts(**manifest["counts"]) == written.counts
    assert len(seen) >= 200 * written.batches * 0.9
    assert seen[-1].share == 1.0
    assert (seen[-1].goal, seen[-1].batches) == (300, written.batches - 1)


def test_no_answer_goes_round_and_all_are_answered(tmp_path):
    model = target()
    head = model.model.lm_head
    head.weight = mx.zeros_like(head.weight)  # greedily one token for ever, otherwise any
    written = write(tmp_path, PLAIN, model, data_tokens=600, rows=4, columns=120, answer_tokens=100)
    assert written.counts.loops > 0
    for tokens, roles in everything(tmp_path):
        assert loop_end(tokens[roles == Role.ASSISTANT]) is None
        assert (roles == Role.ASSISTANT).any()


def test_near_repeats_are_left_out_and_a_target_that_only_repeats_comes_to_an_end(tmp_path):
    model = target()
    head = model.model.lm_head.weight
    model.model.lm_head.weight = head * 300  # temperature 1 is greedy: each opener, one question
    written = write(tmp_path, PLAIN, model, data_tokens=10**6, rows=2, columns=64, answer_tokens=20)
    assert written.ended == "repeats"
    assert written.counts.near_repeats > 0
    again = write(tmp_path, PLAIN, model, data_tokens=10**6, rows=2, columns=64, answer_tokens=20)
    assert again == written


def test_every_prompt_is_answered_once(tmp_path):
    path = prompts(tmp_path, 30)
    out = tmp_path / "out"
    written = write(out, data=str(path), data_tokens=10**6, **ANSWERS)
    assert written.ended == "questions"
    asked = sorted(tuple(tokens[roles == Role.USER].tolist()) for tokens, roles in everything(out))
    lines = path.read_text("utf-8").splitlines()
    assert asked == sorted(tuple(CHAT.encode(json.loads(line)["prompt"])) for line in lines)
    assert write(out, data=str(path), data_tokens=10**6, **ANSWERS) == written


def test_what_of_the_prompts_is_left_out_is_counted(tmp_path):
    path = prompts(tmp_path, 5)
    long, system = "x" * 60, {"role": "system", "content": "y"}
    talk = [system, {"role": "user", "content": "QWERTY"}]
    extra = ["{", json.dumps({"prompt": long}), path.read_text("utf-8").splitlines()[0]]
    extra.append(json.dumps({"messages": talk}))
    path.write_text("\n".join([path.read_text("utf-8"), *extra]), "utf-8")
    options = {"data": str(path), "data_tokens": 10**6, **ANSWERS}
    with pytest.raises(UserError, match="line 6 cannot be used"):
        write(tmp_path / "out", **options)
    left_out = write(tmp_path / "out", skip_bad=True, **options).left_out
    assert left_out == data.LeftOut(bad_lines=1, repeated=1, too_long=1, systems=0)
    plain = write(tmp_path / "plain", PLAIN, skip_bad=True, **options).left_out
    assert plain.systems == 1
    path.write_text(json.dumps({"prompt": long}), "utf-8")
    with pytest.raises(UserError, match="longer than 48 tokens; raise --columns"):
        write(tmp_path / "long", **options)


def test_texts_are_continued(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("Once upon a time\n\nIn a hole", "utf-8")
    out = tmp_path / "out"
    write(out, data=str(path), data_tokens=10**6, **ANSWERS)
    starts = {tuple(tokens[roles == Role.USER].tolist()) for tokens, roles in everything(out)}
    assert starts == {tuple(CHAT.encode(text)) for text in ("Once upon a time", "In a hole")}


def test_jobs_share_the_questions_and_have_seeds_of_their_own(tmp_path):
    options = DataOptions(data=str(prompts(tmp_path)), data_tokens=10**6, **ANSWERS)
    asked = []
    for job in range(2):
        written = write_data(target(), CHAT, tmp_path / str(job), options, job=job, jobs=2)
        assert written.ended == "questions"
        asked += [
            tuple(tokens[roles == Role.USER].tolist())
            for tokens, roles in everything(tmp_path / str(job))
        ]
    lines = prompts(tmp_path).read_text("utf-8").splitlines()
    assert sorted(asked) == sorted(tuple(CHAT.encode(json.loads(x)["prompt"])) for x in lines)
    own = DataOptions(data_tokens=10, **OWN | {"rows": 24})
    for job in range(2):
        write_data(target(), CHAT, tmp_path / f"own-{job}", own, job=job, jobs=2)
    first, second = (files(tmp_path / f"own-{job}") for job in range(2))
    assert first["shard-00000.safetensors"] != second["shard-00000.safetensors"]


def test_time_ends_the_stage_between_batches(tmp_path):
    written = write(tmp_path, data_tokens=10**6, data_minutes=0.0, **OWN)
    assert (written.ended, written.batches) == ("time", 1)
    assert write(tmp_path, data_tokens=10**6, data_minutes=0.0, **OWN).batches == 1


def test_another_target_or_other_options_are_named(tmp_path):
    write(tmp_path, data_tokens=1, **OWN)
    before = files(tmp_path)
    tapped = target()
    tapped.taps = (0,)
    for change, words in (
        ({"columns": 128}, "options columns 200 there, 128 here"),
        ({"seed": 3}, "options seed 0 there, 3 here"),
        ({"rows": 5}, "options rows 6 there, 5 here"),
        ({"data": str(prompts(tmp_path.parent))}, "options data None there"),
        ({"tokenizer": PLAIN}, "options template"),
        ({"model": target(seed=1)}, "target weights"),
        ({"model": target("qwen3")}, "target type llama there, qwen3 here"),
        ({"model": tapped}, r"target layers \[\] there, \[0\] here"),
    ):
        with pytest.raises(UserError, match=words):
            write(tmp_path, **{"data_tokens": 1, **OWN, **change})
    assert files(tmp_path) == before
    assert write(tmp_path, data_tokens=1, **{**OWN, "rows": None}).batches == 1  # as they were


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "{"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    write(tmp_path, data_tokens=1, **OWN)
    (tmp_path / "data.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"data.json is damaged"):
        write(tmp_path, data_tokens=1, **OWN)
    (tmp_path / "data.json").unlink()
    with pytest.raises(UserError, match=r"holds shards but no data.json"):
        write(tmp_path, data_tokens=1, **OWN)


def test_a_damaged_or_foreign_shard_is_named(tmp_path):
    write(tmp_path, data_tokens=1, **OWN)
    path = shard_path(tmp_path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="is not a complete shard"):
        write(tmp_path, data_tokens=300, **OWN)
    path.write_bytes(whole)
    arrays = dict(mx.load(str(path)).items())
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)
    with pytest.raises(UserError, match="was not written by this command"):
        write(tmp_path, data_tokens=300, **OWN)


def test_a_directory_in_use_is_refused(tmp_path):
    with in_use(tmp_path), pytest.raises(UserError, match="is in use by another run"):
        write(tmp_path, data_tokens=1, **OWN)
    assert write(tmp_path, data_tokens=1, **OWN).batches > 0


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        write(tmp_path / "file", data_tokens=1, **OWN)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("full")])
def test_a_full_disk_stops_with_one_line_and_leaves_what_was_complete(tmp_path, monkeypatch, error):
    whole = tmp_path / "whole"
    write(whole, data_tokens=300, **OWN)
    out, save = tmp_path / "out", mx.save_safetensors

    def full(path, arrays, metadata):
        save(path, arrays, metadata)
        if "shard-00001" in path:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(shards.mx, "save_safetensors", full)
        with pytest.raises(UserError, match="complete batches: 1; make room") as told:
            write(out, data_tokens=300, **OWN)
    assert "\n" not in str(told.value)
    assert not [name for name in files(out) if "partial" in name]
    write(out, data_tokens=300, **OWN)
    assert files(out) == files(whole)


def test_ctrl_c_leaves_a_directory_to_go_on_with(tmp_path):
    def interrupt(progress):
        if progress.batches == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, progress=interrupt, data_tokens=300, **OWN)
    assert shard_count(tmp_path) == 1
    assert write(tmp_path, data_tokens=300, **OWN).ended == "tokens"


def test_a_target_whose_rows_must_begin_together_writes_too(tmp_path):
    written = write(tmp_path, PLAIN, target("gemma2"), data_tokens=100, **ANSWERS)
    assert written.ended == "tokens"
    assert written.counts.conversations <= ANSWERS["rows"] * written.batches
