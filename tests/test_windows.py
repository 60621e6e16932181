"""Windows: cut from the right places, and nothing beyond a conversation counts."""

import numpy as np
import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.lockstep import Role
from redrafter_mlx.training.shards import map_shard, shard_path, write_shard
from redrafter_mlx.training.windows import LENGTH, Shards
from test_shards import E, several

STEPS = 4


@pytest.fixture
def paths(tmp_path):
    made = [shard_path(tmp_path, number) for number in range(2)]
    for path in made:
        write_shard(path, several(3, length=30), {})
    return made


def test_a_window_holds_what_follows_its_positions(paths):
    data, file = Shards(paths), map_shard(paths[0])
    assert (data.tokens, data.hidden_size) == (186, E)
    start, first, end = 30, 33, 61  # of the second conversation
    batch = data.batch([(0, start, first, end)], STEPS)
    assert (np.array(batch.hidden)[0] == file["hidden"][first : first + LENGTH]).all()
    reach = LENGTH + STEPS
    expected = file["tokens"][np.minimum(np.arange(first + 1, first + 1 + reach), end - 1)]
    assert (batch.tokens[0] == expected).all()
    last = np.arange(first + 1, first + reach)
    assert (batch.top_ids[0] == file["top_ids"][np.minimum(last, end - 1)]).all()
    roles = file["roles"][np.minimum(last + 1, end - 1)]
    said = np.where(roles == Role.ASSISTANT, 1.0, np.where(roles == Role.USER, 0.5, 0.0))
    assert (batch.weights[0] == said * (last + 1 < end)).all()


def test_the_past_of_a_window_is_its_conversation_up_to_its_positions(paths):
    data, file = Shards(paths), map_shard(paths[0])
    start, end = 30, 61
    windows = [(0, start, 33, end), (0, start, 50, end)]  # the second reaches beyond the end
    past = data.batch(windows, STEPS, slice(1, E)).past
    hidden = np.array(past.hidden)
    assert hidden.shape == (2, 128, E - 1)
    for row, (_, _, first, _) in enumerate(windows):
        assert (past.visible[row] == np.arange(first - start + 1, first - start + 1 + LENGTH)).all()
        known = min(first + LENGTH, end - 1) - start  # places whose next token is known
        assert (past.tokens[row, : known + 1] == file["tokens"][start : start + known + 1]).all()
        assert (hidden[row, 0] == 0).all()  # nothing comes before the first token
        before = file["hidden"][start : start + known - 1, 1:]
        assert (hidden[row, 1:known] == before).all()


def test_windows_cover_every_position_of_what_was_said(paths):
    data = Shards(paths)
    windows = data.windows("0")
    assert windows == data.windows("0") != data.windows("1")
    for f, path in enumerate(paths):
        file = map_shard(path)
        covered = {p for g, _, a, end in windows if g == f for p in range(a, min(a + LENGTH, end))}
        ends = [*file["starts"].tolist()[1:], len(file["tokens"])]
        speaks = [
            p
            for start, end in zip(file["starts"].tolist(), ends, strict=True)
            for p in range(start, end - 2)
            if file["roles"][p + 2] != Role.TEMPLATE
        ]
        assert covered >= set(speaks)


def test_batches_go_on_from_any_number(paths):
    data = Shards(paths)
    stream = data.batches("0", 4, STEPS)
    whole = [next(stream).tokens.tolist() for _ in range(12)]
    for first in (0, 1, 7):
        windows = next(data.draws("0", 4, first))
        assert data.batch(windows, STEPS).tokens.tolist() == whole[first]


def test_shards_of_two_targets_do_not_mix(paths, tmp_path):
    other = several(1, length=20)
    other[0].hidden = other[0].hidden[:, :4]
    path = shard_path(tmp_path, 2)
    write_shard(path, other, {})
    with pytest.raises(UserError, match=r"shard-00002.* was written by another target"):
        Shards([*paths, path])
    with pytest.raises(UserError, match="no training data"):
        Shards([])


def test_tokens_of_people_and_targets_are_counted(paths):
    total = sum(
        np.bincount(file["tokens"][file["roles"] != Role.TEMPLATE], minlength=97)
        for file in map(map_shard, paths)
    )
    assert (Shards(paths).counts(97) == total).all()
