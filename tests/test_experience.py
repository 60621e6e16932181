"""What is known of drafts: written, read, doubted, and never believed when it is damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.measuring.acceptance import Draft, experience_from
from redrafter_mlx.measuring.knowledge import nearest
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.pricing.experience import FILE, Experience, as_text, read
from redrafter_mlx.rounds.tree import Candidates, TokenTree

FULL = Setting(2, 3)
DEMO = Path(__file__).parent.parent / "redrafter_mlx" / "demo_drafter"


def chain() -> Candidates:
    return Candidates.of(TokenTree.from_beams([[7, 8, 9]], np.log([[1.0, 0.5, 0.3]])))


def known(drafts: int = 40) -> Experience:
    return experience_from([Draft(chain(), [0])] * drafts, FULL)


def test_what_is_written_is_read(tmp_path):
    (tmp_path / FILE).write_text(as_text({0.0: known(), 1.0: known(10)}))
    found = read(tmp_path)
    assert found.keys() == {0.0, 1.0}
    assert found[0.0].full == FULL
    np.testing.assert_allclose(found[0.0].accepted, known().accepted)
    (sample, *_) = found[1.0].samples
    assert sample.parents.tolist() == [-1, 0]
    np.testing.assert_allclose(np.exp(sample.logprobs), [0.5, 0.3], atol=1e-3)
    assert "7" not in str(sample.tokens), "no text is kept"


def test_nothing_there_is_nothing_to_talk_about(tmp_path, caplog):
    assert read(tmp_path) == {}
    assert caplog.records == []


def edited(change):
    content = json.loads(as_text({0.0: known()}))
    change(content["by_temperature"]["0"])
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        as_text({0.0: known()}).replace('"format":1', '"format":2'),
        as_text({0.0: known()})[:-40],
        edited(lambda each: each.pop("samples")),
        edited(lambda each: each.update(full=[2])),
        edited(lambda each: each.update(full=[float("inf"), 5])),
        edited(lambda each: each["predicted"].pop()),
        edited(lambda each: each["predicted"][0][0].__setitem__(0, float("nan"))),
        edited(lambda each: each["samples"][0][0].__setitem__(0, 5)),
        edited(lambda each: each["samples"][0][1].__setitem__(0, 0.5)),
        edited(lambda each: each["samples"][0][1].pop()),
    ],
)
def test_a_damaged_file_is_ignored_with_one_line(tmp_path, caplog, text):
    (tmp_path / FILE).write_text(text)
    assert read(tmp_path) == {}
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"{tmp_path / FILE} is ignored: ")
    assert "\n" not in line


def test_many_drafts_weigh_no_more_than_what_is_remembered():
    most = 1 / (1 - Calibration.FADE)
    few, many = known(40), known(5000)
    assert few.predicted.sum() == pytest.approx(40 * 0.8)
    assert many.predicted.sum() == pytest.approx(most * 0.8)
    assert many.accepted.sum() == pytest.approx(most)
    assert len(many.samples) == 32


def test_what_was_found_without_a_search_is_no_sample_of_one():
    echo = Candidates.of(TokenTree.from_beams([[7, 8]], np.log([[1.0, 0.9]])))
    echo.always[:] = True
    found = experience_from([Draft(echo, [0]), Draft(chain(), [])], FULL)
    assert len(found.samples) == 1
    assert found.accepted[1].sum() == 1


def test_the_nearest_temperature_is_a_hint():
    found = {0.0: known(), 1.0: known(10)}
    assert nearest({}, 0.0) is None
    assert nearest(found, 1.0) is found[1.0]
    hint = nearest(found, 0.4)
    assert len(hint.samples) == len(found[0.0].samples)
    assert hint.predicted.sum(axis=-1).max() == pytest.approx(Calibration.PRIOR)
    np.testing.assert_allclose(
        hint.accepted.sum() / hint.predicted.sum(), 1.25 * 0.8 * 2 / 2, atol=0.7
    )


def test_another_search_may_use_it():
    wide = known().within(Setting(4, 6))
    assert wide.predicted.shape == (2, 5, 8)
    np.testing.assert_allclose(wide.accepted[:, 4], known().accepted[:, 1])
    assert wide.samples == []


def test_the_demo_drafter_brings_its_own():
    found = read(DEMO)
    assert found.keys() == {0.0, 1.0}
    for each in found.values():
        assert each.full == (DraftOptions.beam_width, DraftOptions.beam_length)
        assert len(each.samples) == 32
        assert 0.2 < each.accepted[0].sum() / each.predicted[0].sum() < 2
        assert not each.accepted[1].any(), "of the head alone"
