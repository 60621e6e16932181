"""The sampler: known-answer noise, exact soft-max draws, and mlx-lm's filters and penalties."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    make_logits_processors,
)

from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.rounds import sampling
from redrafter_mlx.rounds.sampling import Noise, Sampler, gumbel, seed_key, threefry

DRAWS = 100_000


def words(values) -> np.ndarray:
    return np.array(values, np.uint32)


def numpy_noise(seed: int, positions, ids) -> np.ndarray:
    return gumbel(seed_key(seed), words(positions), words(ids))


def random_logits(seed: int, size: int, spread: float = 3.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).normal(size=size)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


# ---------------------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
@pytest.mark.parametrize("xp", [np, mx], ids=["numpy", "mlx"])
def test_threefry_gives_the_known_answers(xp, counter, key, expected):
    as_words = lambda pair: [xp.array([word], dtype=xp.uint32) for word in pair]
    got = threefry(as_words(key), as_words(counter), xp)
    assert [int(word[0]) for word in got] == list(expected)


def test_numpy_and_mlx_draw_the_same_bits():
    rng = np.random.default_rng(0)
    key, counter = rng.integers(0, 2**32, (2, 2, 1000), np.uint32)
    host = threefry(key, counter)
    device = threefry([mx.array(k) for k in key], [mx.array(c) for c in counter], mx)
    for a, b in zip(host, device, strict=True):
        np.testing.assert_array_equal(a, np.array(b))


def test_numpy_and_mlx_draw_the_same_noise():
    key = seed_key(0x0123456789ABCDEF)
    positions, ids = words([[0], [1], [77], [100_000]]), words([np.arange(5000)])
    host = gumbel(key, positions, ids)
    device = np.array(gumbel(mx.array(key), mx.array(positions), mx.array(ids), mx))
    assert host.shape == device.shape == (4, 5000)
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(host, device, rtol=1e-6, atol=5e-6)


def test_the_key_holds_all_64_bits_of_the_seed():
    assert seed_key(0x0123456789ABCDEF).tolist() == [0x89ABCDEF, 0x01234567]
    assert seed_key(2**64 - 1).tolist() == [2**32 - 1, 2**32 - 1]


@pytest.mark.parametrize("along", ["ids", "positions"])
def test_noise_is_gumbel_distributed(along):
    """Kolmogorov-Smirnov; 1.95 / sqrt(n) is exceeded by one sample in a thousand."""
    fixed, running = words([3]), np.arange(DRAWS)
    at = (fixed, running) if along == "ids" else (running, fixed)
    noise = np.sort(numpy_noise(11, *at).astype(np.float64))
    exact = np.exp(-np.exp(-noise))
    steps = np.arange(DRAWS + 1) / DRAWS
    distance = max((steps[1:] - exact).max(), (exact - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 5, 0), (1, 5, 1)),  # neighbouring token ids
        ((1, 5, 0), (1, 6, 0)),  # neighbouring positions
        ((1, 5, 0), (2, 5, 0)),  # neighbouring seeds
        ((1, 5, 0), (1 + 2**32, 5, 0)),  # seeds that differ in their high half
    ],
)
def test_noise_is_independent_across_ids_positions_and_seeds(one, other):
    """Chi-square on a 16 x 16 table of quantiles; 255 degrees of freedom, 0.1 %: 330.5."""
    quantiles = []
    for seed, position, id in (one, other):
        noise = numpy_noise(seed, position + np.arange(DRAWS)[:, None] * 2, id + np.zeros(1))
        quantiles.append(np.exp(-np.exp(-noise[:, 0].astype(np.float64))))
    table, *_ = np.histogram2d(*quantiles, bins=16, range=[[0, 1], [0, 1]])
    expected = DRAWS / 256
    assert ((table - expected) ** 2 / expected).sum() < 330.5


def test_the_extreme_bits_give_the_finite_bounds_that_pruning_relies_on(monkeypatch):
    bits = words([0, 2**32 - 1])
    monkeypatch.setattr(sampling, "threefry", lambda *_: (bits, bits))
    highest, lowest = numpy_noise(0, [0], [0, 1])
    assert highest == pytest.approx(sampling._HIGHEST_NOISE, abs=1e-5)
    assert lowest == pytest.approx(sampling._LOWEST_NOISE, abs=1e-5)
    assert (highest, lowest) == (pytest.approx(16.64, abs=0.01), pytest.approx(-2.81, abs=0.01))


# ---------------------------------------------------------------------------------------------
# Choosing


def chi_square(logits, probs, draws: int, **options) -> float:
    sampler = Sampler(SamplingOptions(**options))
    chosen = [sampler.choose(logits, position, [0]) for position in range(draws)]
    counts = np.bincount(chosen, minlength=len(probs))
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = draws * probs[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temp", [0.3, 1.0, 2.5])
def test_choices_follow_the_softmax(temp):
    """7 degrees of freedom, 0.1 %: 24.3."""
    logits = np.array([0.0, 0.3, -0.5, 1.0, 0.9, -0.2, 0.6, 0.1], np.float32)
    assert chi_square(logits, softmax(logits / temp), 3000, temp=temp, seed=5) < 24.3


def test_choices_after_a_filter_follow_the_rescaled_softmax():
    """Filters act before the temperature, as in mlx-lm; 2 degrees of freedom, 0.1 %: 13.8."""
    logits = np.array([0.0, 0.3, -0.5, 1.0, 0.9, -0.2], np.float32)
    kept = np.where(np.isin(np.arange(6), [3, 4, 1]), softmax(logits / 2), 0)
    assert chi_square(logits, kept / kept.sum(), 3000, temp=2.0, top_k=3, seed=5) < 13.8


@pytest.mark.parametrize("temp", [0.05, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 20.0, 100.0])
def test_pruning_the_candidates_never_changes_the_answer(spread, temp):
    sampler = Sampler(SamplingOptions(temp=temp, seed=3))
    everything = np.arange(5000)
    for position in range(20):
        logits = random_logits(position, 5000, spread)
        noise = numpy_noise(3, [position], everything).astype(np.float64)
        best = int(np.argmax(logits.astype(np.float64) / temp + noise))
        assert sampler.choose(logits, position, [0]) == best


def test_pruning_leaves_few_candidates_of_a_peaked_row():
    logits = random_logits(0, 5000, spread=20.0)
    ids, scores = Sampler(SamplingOptions(temp=0.5, seed=0)).scores(logits, 0, [0])
    assert len(ids) == len(scores) < 500
    assert np.argmax(logits) in ids


def test_a_choice_depends_on_seed_and_position_only():
    logits = random_logits(0, 50, spread=1.0)

    def choices(seed, positions=range(40), history=(0,)):
        sampler = Sampler(SamplingOptions(temp=1.0, seed=seed))
        return [sampler.choose(logits, position, history) for position in positions]

    first = choices(9)
    assert choices(9, history=(1, 2, 3)) == first
    assert choices(9, positions=reversed(range(40))) == first[::-1]
    assert len(set(first)) > 5
    assert choices(10) != first
    assert choices(9 + 2**32) != first


def test_a_batch_of_rows_is_prepared_as_one():
    rows = np.stack([random_logits(seed, 50) for seed in range(3)])
    for temp in (0.0, 1.0):
        sampler = Sampler(SamplingOptions(temp=temp, seed=1))
        prepared = np.array(sampler.prepare(mx.array(rows).astype(mx.float16)))
        for row in range(3):
            alone = np.array(sampler.prepare(mx.array(rows[row : row + 1]).astype(mx.float16)))
            assert sampler.choose(prepared[row], 4, [0]) == sampler.choose(alone[0], 4, [0])


def test_temperature_zero_takes_the_likeliest_token_on_the_device():
    sampler = Sampler(SamplingOptions(seed=1))
    logits = random_logits(0, 50)
    assert sampler.is_argmax
    prepared = sampler.prepare(mx.array(logits)[None])
    assert prepared.shape == (1,)
    assert sampler.choose(np.array(prepared)[0], 7, [0]) == np.argmax(logits)


def test_the_choice_is_more_than_an_argmax_when_anything_acts_on_the_logits():
    assert not Sampler(SamplingOptions(temp=0.1)).is_argmax
    assert not Sampler(SamplingOptions(presence_penalty=1.0)).is_argmax
    assert not Sampler(SamplingOptions(logit_bias={1: 1.0})).is_argmax
    assert not Sampler(SamplingOptions(), [lambda tokens, logits: logits]).is_argmax
    assert Sampler(SamplingOptions(top_p=0.5, top_k=3, repetition_penalty=0.0)).is_argmax


def test_a_drafter_is_told_the_noise_that_will_be_added():
    noise = Sampler(SamplingOptions(temp=0.7, seed=2**40 + 5)).noise
    assert noise.key.tolist() == [5, 2**8]
    assert noise.temp.item() == pytest.approx(0.7)
    assert Sampler(SamplingOptions(seed=5)).noise is None
    assert Noise.silent().temp.item() == 0


# ---------------------------------------------------------------------------------------------
# Filters


def mlx_lm_support(rows: np.ndarray, o: SamplingOptions) -> np.ndarray:
    """What mlx_lm.sample_utils.make_sampler leaves of each row, filter by filter in its order."""
    left = mx.array(rows)
    left = left - mx.logsumexp(left, axis=-1, keepdims=True)
    if 0 < o.top_p < 1:
        left = apply_top_p(left, o.top_p)
    if o.min_p != 0:
        left = apply_min_p(left, o.min_p, o.min_tokens_to_keep)
    if o.xtc_probability > 0:
        left = apply_xtc(left, o.xtc_probability, o.xtc_threshold, list(o.xtc_special_tokens))
    if o.top_k > 0:
        left = apply_top_k(left, o.top_k)
    return np.isfinite(np.array(left))


def assert_same_support(**filters) -> None:
    """At a high temperature nothing is pruned; at a low one only what cannot win."""
    rows = np.stack([random_logits(seed, 200, spread=(1, 3, 9)[seed % 3]) for seed in range(45)])
    expected = mlx_lm_support(rows, SamplingOptions(**filters))
    assert not expected.all()
    for temp in (20.0, 0.3):
        sampler = Sampler(SamplingOptions(temp=temp, seed=0, **filters))
        reach = temp * (sampling._HIGHEST_NOISE - sampling._LOWEST_NOISE)
        for position, logits in enumerate(rows):
            can_win = logits >= logits.max() - reach
            assert can_win.all() or temp < 1
            ids, _ = sampler.scores(logits, position, [0])
            kept = np.zeros(len(logits), int)
            np.add.at(kept, ids, 1)
            assert kept.max() == 1
            np.testing.assert_array_equal((kept > 0) & can_win, expected[position] & can_win)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.7, 0.9, 0.999])
def test_top_p_keeps_what_mlx_lm_keeps(top_p):
    assert_same_support(top_p=top_p)


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_top_p_at_its_ends_is_off(top_p):
    ids, _ = Sampler(SamplingOptions(temp=10.0, top_p=top_p)).scores(random_logits(0, 99), 0, [0])
    assert len(ids) == 99


@pytest.mark.parametrize("least", [1, 2, 17])
@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_mlx_lm_keeps(min_p, least):
    assert_same_support(min_p=min_p, min_tokens_to_keep=least)


@pytest.mark.parametrize("top_k", [1, 2, 40, 199])
def test_top_k_keeps_what_mlx_lm_keeps(top_k):
    assert_same_support(top_k=top_k)


def test_top_k_beyond_the_vocabulary_keeps_everything():
    ids, _ = Sampler(SamplingOptions(temp=10.0, top_k=1000)).scores(random_logits(0, 50), 0, [0])
    assert len(ids) == 50


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("special", [(), tuple(range(0, 200, 2))])
def test_xtc_keeps_what_mlx_lm_keeps(threshold, special):
    filters = {"xtc_threshold": threshold, "xtc_special_tokens": special}
    assert_same_support(xtc_probability=1.0, **filters)


def test_xtc_at_its_highest_threshold_drops_nothing():
    """At most one token can be likelier than one half, and the least likely candidate stays."""
    options = SamplingOptions(temp=10.0, xtc_probability=1.0, xtc_threshold=0.5)
    for seed in range(20):
        ids, _ = Sampler(options).scores(random_logits(seed, 50), seed, [0])
        assert len(ids) == 50


@pytest.mark.parametrize("seed", range(12))
def test_combined_filters_keep_what_mlx_lm_keeps(seed):
    rng = np.random.default_rng(seed)
    filters = {
        "top_p": float(rng.choice([0.5, 0.8, 0.95])),
        "min_p": float(rng.choice([0.01, 0.05, 0.2])),
        "xtc_probability": float(rng.choice([0.0, 1.0])),
        "xtc_threshold": float(rng.choice([0.05, 0.15])),
        "top_k": int(rng.choice([0, 3, 10])),
    }
    assert_same_support(**filters)


@pytest.mark.parametrize("least", [3, 10])
def test_min_p_never_brings_back_what_top_p_dropped(least):
    assert_same_support(top_p=0.5, min_p=0.5, min_tokens_to_keep=least)


def test_the_likeliest_token_outlives_the_strictest_filters():
    strict = {"top_p": 1e-6, "min_p": 1.0, "top_k": 1, "xtc_probability": 1.0}
    for seed in range(20):
        logits = random_logits(seed, 50)
        ids, _ = Sampler(SamplingOptions(temp=1.0, **strict)).scores(logits, seed, [0])
        assert ids.tolist() == [np.argmax(logits)]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_xtc_strikes_as_often_as_it_is_asked_to(probability):
    """Five standard deviations over 3000 positions; the top token is out whenever it strikes."""
    logits = np.log(np.array([0.5, 0.3, 0.1, 0.1], np.float32))
    options = SamplingOptions(temp=1.0, seed=8, xtc_probability=probability, xtc_threshold=0.2)
    sampler = Sampler(options)
    strikes = sum(0 not in sampler.scores(logits, position, [0])[0] for position in range(3000))
    deviation = math.sqrt(3000 * probability * (1 - probability))
    assert abs(strikes - 3000 * probability) < 5 * deviation


# ---------------------------------------------------------------------------------------------
# Penalties and processors


def mlx_lm_processed(logits: np.ndarray, history, **options) -> np.ndarray:
    row = mx.array(logits)[None]
    for processor in make_logits_processors(**options):
        row = processor(mx.array(history), row)
    return np.array(row[0])


PENALTIES = [
    {"logit_bias": {3: 5.0, 0: -2.5, 49: 1e4}},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "repetition_context_size": 4},
    {"presence_penalty": 0.75},
    {"presence_penalty": -1.0, "presence_context_size": 1},
    {"frequency_penalty": 0.25},
    {"frequency_penalty": -0.5, "frequency_context_size": 7},
    {
        "logit_bias": {5: 1.5},
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "frequency_context_size": 3,
    },
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda o: ",".join(o))
@pytest.mark.parametrize("length", [1, 5, 100])
def test_penalties_equal_those_of_mlx_lm(options, length):
    """The histories repeat tokens; they are shorter and longer than the context sizes."""
    sampler = Sampler(SamplingOptions(**options))
    for seed in range(5):
        logits = random_logits(seed, 50)
        history = np.random.default_rng(seed).integers(0, 8, length).tolist()
        before = logits.copy()
        ids, scores = sampler.scores(logits, length, history)
        expected = mlx_lm_processed(logits, history, **options)
        assert ids.tolist() == list(range(50))
        np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)
        assert not np.array_equal(scores, before)
        np.testing.assert_array_equal(logits, before)  # the caller's row is left alone


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_bias_decides_the_choice(temp):
    sampler = Sampler(SamplingOptions(temp=temp, seed=0, logit_bias={17: 1e4}))
    assert sampler.choose(random_logits(0, 50), 0, [0]) == 17


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_custom_processor_sees_the_history_and_decides_the_choice(temp):
    seen = []

    def only_the_next_id(tokens, logits):
        seen.append((tokens.tolist(), logits.shape))
        allowed = mx.arange(logits.shape[-1]) == (tokens[-1] + 1) % logits.shape[-1]
        return mx.where(allowed, logits, -mx.inf)

    sampler = Sampler(SamplingOptions(temp=temp, seed=0), [only_the_next_id])
    logits = random_logits(0, 50)
    assert [sampler.choose(logits, 3, [5, 5, last]) for last in (6, 30)] == [7, 31]
    assert seen == [([5, 5, 6], (1, 50)), ([5, 5, 30], (1, 50))]


def test_custom_processors_run_in_order_after_the_penalties():
    options = SamplingOptions(logit_bias={0: 1.0})
    double, less_one = (lambda _, x: x * 2), (lambda _, x: x - 1)
    logits = np.array([1.0, 5.0], np.float32)
    assert Sampler(options, [double, less_one]).scores(logits, 0, [0])[1].tolist() == [3, 9]
    assert Sampler(options, [less_one, double]).scores(logits, 0, [0])[1].tolist() == [2, 8]


def test_a_custom_processor_may_answer_in_16_bits():
    sampler = Sampler(SamplingOptions(temp=1.0, seed=0), [lambda _, x: x.astype(mx.bfloat16)])
    logits = random_logits(0, 50)
    rounded = np.array(mx.array(logits).astype(mx.bfloat16).astype(mx.float32))
    plain = Sampler(SamplingOptions(temp=1.0, seed=0))
    for position in range(20):
        expected = plain.choose(rounded, position, [0])
        assert sampler.choose(logits, position, [0]) == expected
