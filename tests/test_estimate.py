"""What --dry-run says: memory is a bound that holds, and rows are chosen to keep it."""

import gc

import mlx.core as mx
import pytest

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training import estimate as module
from redrafter_mlx.training.data import write_data
from redrafter_mlx.training.estimate import (
    choose_jobs,
    choose_rows,
    estimate,
    memory_needed,
    share,
)
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.shards import held_out_shards, training_shards
from support import TinyTokenizer


@pytest.fixture
def target():
    return Target(build("llama"))


def test_the_bound_on_memory_holds(target, tmp_path):
    gc.collect()  # arrays of earlier tests must not be freed meanwhile
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    options = DataOptions(data_tokens=1, rows=32, columns=512)
    write_data(target, TinyTokenizer(chat=False), tmp_path, options)
    peak = mx.get_peak_memory() - before
    assert 0.1 * memory_needed(target, 32, 512) < peak < memory_needed(target, 32, 512)


def test_disk_is_what_the_shards_take(target, tmp_path):
    options = DataOptions(data_tokens=1, rows=16, columns=128)
    promised = estimate(target, options)
    write_data(target, TinyTokenizer(chat=False), tmp_path, options)
    paths = [*training_shards([tmp_path]), *held_out_shards([tmp_path])]
    taken = sum(path.stat().st_size for path in paths)
    assert (promised.batches, promised.rows) == (1, 16)
    assert 0.9 * promised.disk < taken < 1.1 * promised.disk


def test_memory_grows_with_rows_columns_layers_and_windows(target):
    one = memory_needed(target, 1, 512)
    assert memory_needed(target, 2, 512) > one
    assert memory_needed(target, 1, 1024) > one
    target.taps = (0, 1)
    assert memory_needed(target, 1, 512) > one


def test_a_sliding_window_bounds_keys_and_values():
    local = Target(build("gemma3_text"))  # every other layer slides
    growth = lambda: memory_needed(local, 1, 8192) - memory_needed(local, 1, 4096)
    bounded = growth()

    def unbounded():
        caches = Target.empty_caches(local)
        for cache in caches.layers:
            cache.window = None
        return caches

    local.empty_caches = unbounded
    assert growth() > bounded


def test_rows_fit_into_memory(target):
    base, each = memory_needed(target, 0, 512), memory_needed(target, 1, 512)
    each -= base
    for rows in (1, 5, 20):
        options = DataOptions(memory=(base + (rows + 0.5) * each) / 1e9)
        assert choose_rows(target, options) == rows
        with pytest.raises(UserError, match=f"{rows + 1} rows of 512 columns need"):
            choose_rows(target, DataOptions(memory=options.memory, rows=rows + 1))
    with pytest.raises(UserError, match=r"1 rows of 512 columns need .* raise it or lower"):
        choose_rows(target, DataOptions(memory=0.0))


def test_no_more_rows_than_the_goal_needs(target):
    assert choose_rows(target, DataOptions(data_tokens=1)) == 1
    assert choose_rows(target, DataOptions(data_tokens=2000)) == 7
    assert choose_rows(target, DataOptions()) >= 64


def test_a_time_limit_bounds_the_estimate(target, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))  # 1 s a column
    options = {"data_tokens": 98_000, "rows": 64, "columns": 512}
    whole = estimate(target, DataOptions(**options))
    assert (whole.batches, whole.seconds) == (5, 5 * 512.0)
    assert whole.tokens_per_second == pytest.approx(module.ANSWERS * 64)
    limited = estimate(target, DataOptions(data_minutes=20.0, **options))
    assert (limited.batches, limited.seconds) == (2, 2 * 512.0)
    assert limited.disk == pytest.approx(whole.disk * 2 / 5)


def test_families_without_the_usual_names_are_reckoned_too():
    for name in ("deepseek_v3", "gemma3_text", "mixtral", "qwen3_5", "falcon_h1"):
        assert memory_needed(Target(build(name)), 8, 512) > 0
        assert estimate(Target(build(name)), DataOptions(rows=2, columns=64)).seconds > 0


def test_jobs_are_as_asked_for_or_as_fit(target, monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 3)
    assert choose_jobs(target, DataOptions(jobs=7)) == 7
    if mx.default_device() == mx.gpu:
        assert choose_jobs(target, DataOptions()) == 1
        return
    assert choose_jobs(target, DataOptions()) == 3
    two = 2.5 * memory_needed(target, 64, 512) / 1e9
    assert choose_jobs(target, DataOptions(memory=two)) == 2
    assert choose_jobs(target, DataOptions(memory=0.0001)) == 1


def test_a_job_has_its_share_of_the_tokens_and_the_memory():
    first, second = (share(DataOptions(data_tokens=9, memory=4.0, seed=5), j, 2) for j in (0, 1))
    assert (first.data_tokens, first.memory) == (second.data_tokens, second.memory) == (5, 2.0)
    assert first.seed == 5 != second.seed
