"""The engine: the same text warm or cold, alone or among others, and nothing lost between them."""

from __future__ import annotations

import queue
import random
import threading
from contextlib import contextmanager

import mlx.core as mx
import pytest

from families import build
from published_heads import write_eagle3
from redrafter_mlx.config import DraftOptions, EngineOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.engine import Engine, QueueFull, Request, Served, Stopping
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import drafters
from redrafter_mlx.target.adapter import adapt
from support import Numbers, ScriptedDrafter, generation, ids, random_drafter, tiny_prompt

FAMILIES = ["llama", "gemma3_text", "qwen3_5", "lfm2", "falcon_h1", "mamba2", "llama4"]
FIXED = DraftOptions(budget=6, beam_width=2, beam_length=3)


@contextmanager
def engine_of(family="llama", drafter=None, eos=(), options=None, **config):
    """An engine on a tiny target; drafter: made in its thread, of the model."""

    def load():
        model = build(family, **config)
        made = {"default": drafter(model) if drafter else None}
        return Served("tiny", model, Numbers(eos), made)

    engine = Engine(load, options or EngineOptions()).start()
    try:
        yield engine
    finally:
        engine.stop()


class Answer:
    """A request's turns as they come."""

    def __init__(self, engine, prompt, tokens=24, marks=(), draft=FIXED, chunk=16, stop=(),
                 drafter="default", top=None, kv=None, **sampling):  # fmt: skip
        self._turns, self.seen = queue.Queue(), []
        request = Request(
            prompt,
            GenerationOptions(max_tokens=tokens, prefill_step_size=chunk, stop=stop, **(kv or {})),
            SamplingOptions(**sampling),
            draft,
            drafter,
            top,
            marks,
        )
        self.ticket = engine.submit(request, self._turns.put)

    def next(self):
        self.seen.append(self._turns.get(timeout=120))
        return self.seen[-1]

    def finish(self):
        while not self.seen or self.seen[-1].finish_reason is None:
            self.next()
        if self.seen[-1].error is not None:
            raise self.seen[-1].error
        return self

    @property
    def tokens(self):
        return [piece.token for turn in self.finish().seen for piece in turn.pieces]

    @property
    def cached(self):
        return self.finish().seen[-1].stats["cached_tokens"]

    @property
    def reason(self):
        return self.finish().seen[-1].finish_reason


def lookback(model):
    return random_drafter(model, lookback_heads=2, lookback_size=8, tied_output=True)


def eagle3(path):
    def make(model):
        return drafters.load_drafter(str(write_eagle3(path, adapt(model))), model)

    return make


def small_model(model):
    return ModelDrafter(build("llama", seed=1), adapt(model).vocab_size)


def united(model):
    return UnionDrafter([lookback(model), MaxGramDrafter()])


def plain(family, prompt, tokens=24, **sampling):
    return ids(generation(build(family), prompt, max_tokens=tokens, **sampling))


def conversation(first, answers, turns=3):
    """Prompts of a dialogue: each is the one before, its answer, and something new."""
    prompt = list(first)
    for turn in range(turns):
        yield prompt
        prompt = prompt + answers[-1] + tiny_prompt(7, seed=turn + 10)


@pytest.mark.parametrize("temp", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dialogue_goes_on_where_it_ended_and_says_the_same(family, temp):
    answers = []
    with engine_of(family, united) as engine:
        for turn, prompt in enumerate(conversation(tiny_prompt(41), answers)):
            answer = Answer(engine, prompt, temp=temp, seed=5, marks=[len(prompt) - 3])
            answers.append(answer.tokens)
            assert answers[-1] == plain(family, prompt, temp=temp, seed=5)
            assert (answer.cached > 0) == (turn > 0)
            if turn:
                assert answer.cached >= len(prompt) - 7 - 4  # all but what is new


@pytest.mark.parametrize("make", [lookback, "eagle3", small_model])
def test_a_drafter_goes_on_as_if_it_had_read_everything(make, tmp_path):
    """What it knows after a warm beginning is what a cold one would have told it: same trees."""
    make = eagle3(tmp_path) if make == "eagle3" else make
    first = tiny_prompt(40)
    with engine_of("llama", make) as engine:
        answer = Answer(engine, first).tokens
        prompt = first + answer + tiny_prompt(9, seed=3)
        warm = Answer(engine, prompt)
        assert warm.cached > len(first)
    with engine_of("llama", make) as engine:
        cold = Answer(engine, prompt)
        assert cold.cached == 0
    assert warm.tokens == cold.tokens
    assert trees(warm) == trees(cold)


def trees(answer):
    found = [turn.tree for turn in answer.finish().seen if turn.tree is not None]
    assert any(len(tree.tokens) > 1 for tree in found)
    return [(tree.tokens, tree.parents) for tree in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_is_dropped_leaves_the_prompt_before_it(family):
    """As by templates that leave the reasoning of earlier turns out."""
    first = tiny_prompt(50)
    with engine_of(family, united) as engine:
        Answer(engine, first, marks=[len(first) - 4]).finish()
        prompt = first[:-4] + tiny_prompt(30, seed=8)
        answer = Answer(engine, prompt)
        assert answer.cached == len(first) - 4 - 2
        assert answer.tokens == plain(family, prompt)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5"])
def test_many_at_once_each_say_what_they_say_alone(family):
    rng = random.Random(0)
    begun = tiny_prompt(30, seed=99)
    wanted = []
    with engine_of(family, united, options=EngineOptions(parallel=8, queue=64)) as engine:
        for number in range(24):
            size, temp = rng.randrange(1, 60), rng.choice([0.0, 0.7])
            prompt = (begun if number % 3 else []) + tiny_prompt(size, seed=number)
            drafter = rng.choice(["default", "max_gram", "none"])
            tokens = rng.randrange(1, 30)
            how = {"tokens": tokens, "temp": temp, "seed": number}
            wanted.append((Answer(engine, prompt, drafter=drafter, **how), prompt, how))
        cut = [Answer(engine, tiny_prompt(20, seed=i), tokens=2000) for i in range(3)]
        for answer in cut:
            answer.next()
            answer.ticket.cancel()
        assert [answer.reason for answer in cut] == ["cancelled"] * 3
        for answer, prompt, how in wanted:
            assert answer.tokens == plain(family, prompt, **how)
        assert engine.status()["running"] == engine.status()["waiting"] == 0
        assert engine.totals.finished == {"length": 24, "cancelled": 3}


def test_short_questions_do_not_wait_for_long_answers():
    with engine_of() as engine:
        long = Answer(engine, tiny_prompt(500), tokens=400)
        long.next()
        short = Answer(engine, tiny_prompt(8), tokens=4)
        short.finish()
        assert engine.status()["running"] >= 1
        long.ticket.cancel()
        assert long.reason == "cancelled"


def test_a_cancelled_request_ends_within_a_round_and_frees_its_place():
    with engine_of(options=EngineOptions(parallel=1)) as engine:
        first = Answer(engine, tiny_prompt(8), tokens=2_000)
        second = Answer(engine, tiny_prompt(8), tokens=3)
        waiting = Answer(engine, tiny_prompt(9), tokens=3)
        waiting.ticket.cancel()
        first.next()
        first.ticket.cancel()
        assert len(second.tokens) == 3
        assert first.reason == waiting.reason == "cancelled"


def test_the_queue_has_an_end():
    with engine_of(options=EngineOptions(parallel=1, queue=2)) as engine:
        running = Answer(engine, tiny_prompt(8), tokens=2_000)
        running.next()
        waiting = [Answer(engine, tiny_prompt(8), tokens=2) for _ in range(2)]
        with pytest.raises(QueueFull) as refusal:
            Answer(engine, tiny_prompt(8))
        assert refusal.value.retry_after >= 1
        running.ticket.cancel()
        assert [answer.reason for answer in waiting] == ["length"] * 2


def test_memory_for_texts_is_bounded():
    with engine_of(options=EngineOptions(cache_memory=0.0)) as engine:
        answers = [Answer(engine, tiny_prompt(30, seed=i % 2)) for i in range(4)]
        assert [answer.cached for answer in answers] == [0] * 4
        assert engine.status()["prefix_bytes"] == 0
    with engine_of() as engine:
        size = None
        for i in range(6):
            Answer(engine, tiny_prompt(30, seed=i)).finish()
            size = size or settled(engine)["prefix_bytes"]
            engine.cache_bytes = 3 * size
        assert settled(engine)["prefixes"] == 3
        assert Answer(engine, tiny_prompt(30, seed=5)).cached
        assert not Answer(engine, tiny_prompt(30, seed=0)).cached


def settled(engine):
    """Its status after it has put the last text away."""
    done = threading.Event()
    Answer(engine, [1], tokens=1).finish()
    done.set()
    return engine.status()


def test_what_others_say_is_never_proposed():
    """Max-Gram knows the text it drafts for, not the texts that were written before."""
    secret = [7, 3, 9, 1, 4, 2, 8, 6] * 4
    with engine_of(drafter=lambda model: MaxGramDrafter()) as engine:
        Answer(engine, secret).finish()
        other = Answer(engine, [5, 5, 7, 3, 9], draft=DraftOptions(budget=16), tokens=1)
        found = [turn.tree for turn in other.finish().seen if turn.tree]
        assert all(1 not in tree.tokens[1:] for tree in found)


def test_logprobs_are_the_targets(tmp_path):
    prompt = tiny_prompt(12)
    with engine_of() as engine:
        answer = Answer(engine, prompt, tokens=5, top=3)
        pieces = [piece for turn in answer.finish().seen for piece in turn.pieces]
    model = build("llama")
    text = list(prompt)
    for piece in pieces:
        logits = model(mx.array([text]))[0, -1]
        logprobs = (logits - mx.logsumexp(logits)).tolist()
        assert piece.logprob == pytest.approx(logprobs[piece.token], abs=1e-4)
        assert piece.top_logprobs[0][0] == piece.token
        assert len(piece.top_logprobs) == 3
        text.append(piece.token)


def test_stop_strings_and_ends_of_text():
    prompt = tiny_prompt(12)
    said = plain("llama", prompt)
    with engine_of(eos=[said[6]]) as engine:
        assert Answer(engine, prompt).tokens == said[: said.index(said[6]) + 1]
    with engine_of(drafter=lambda m: ScriptedDrafter(prompt + said, right=4)) as engine:
        stopped = Answer(engine, prompt, stop=(f" {said[5]}",))
        assert "".join(t.text for t in stopped.finish().seen) == "".join(
            f" {token}" for token in said[: said.index(said[5])]
        )
        assert stopped.reason == "stop"
        again = Answer(engine, prompt + said[:8], drafter="none")
        assert again.cached
        assert again.tokens == plain("llama", prompt + said[:8])


@pytest.mark.parametrize("right", [0, 1, 4])
def test_which_tokens_a_stop_string_leaves_is_told(right):
    """At the end just those before it, and before the end none that may still belong to it."""
    prompt = tiny_prompt(12)
    said = plain("llama", prompt)
    stops = (f" {said[7]} {said[8]} {said[9]}", f" {said[7]} no", f" {said[6]} {said[7]} no")
    with engine_of(drafter=lambda m: ScriptedDrafter(prompt + said, right=right)) as engine:
        seen = Answer(engine, prompt, stop=stops).finish().seen
        whole = Answer(engine, prompt, tokens=9, stop=stops).finish().seen
    pieces = sum(len(turn.pieces) for turn in seen)
    assert (pieces, seen[-1].kept, seen[-1].stopped_by) == (10, 7, stops[0])
    assert all(turn.kept <= 7 and turn.stopped_by is None for turn in seen[:-1])
    kept = [turn.kept for turn in whole]
    assert kept == sorted(kept)
    assert (kept[-1], whole[-1].stopped_by, whole[-1].finish_reason) == (9, None, "length")


def test_progress_of_a_prompt_is_told():
    with engine_of() as engine:
        answer = Answer(engine, tiny_prompt(100), tokens=2).finish()
        read = [turn.prompt_done for turn in answer.seen if not turn.pieces]
        assert read == sorted(read)
        assert len(read) >= 6
        assert answer.seen[-1].prompt_done == 100


def test_quantised_caches_say_the_same_warm_or_cold():
    kv = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    wide = {"head_dim": 32, "hidden_size": 128}  # mlx has no smaller groups than 32
    first = tiny_prompt(30)
    with engine_of(**wide) as engine:
        said = Answer(engine, first, kv=kv).tokens
        prompt = first + said + [1, 2, 3]
        warm = Answer(engine, prompt, kv=kv).tokens
    with engine_of(**wide) as engine:
        assert Answer(engine, prompt, kv=kv).tokens == warm


def test_what_is_not_there_is_refused():
    with engine_of() as engine:
        with pytest.raises(UserError, match="'best' is not loaded; there are: default, max_gram"):
            Answer(engine, [1], drafter="best")
        with pytest.raises(UserError, match="empty"):
            Answer(engine, [])
    with pytest.raises(Stopping):
        Answer(engine, [1])


def test_a_request_that_fails_harms_no_other():
    def broken(tokens, logits):
        raise ValueError("no such thing")

    with engine_of() as engine:
        turns = queue.Queue()
        engine.submit(Request([1, 2], logits_processors=[broken]), turns.put)
        other = Answer(engine, tiny_prompt(8))
        while (turn := turns.get(timeout=60)).finish_reason is None:
            pass
        assert turn.finish_reason == "error"
        assert "no such thing" in str(turn.error)
        assert other.tokens == plain("llama", tiny_prompt(8))


def test_stopping_lets_running_ones_end_or_cuts_them():
    with engine_of() as engine:
        answer = Answer(engine, tiny_prompt(8), tokens=20)
        engine.stop(grace=60)
        assert answer.reason == "length"
        assert not engine.is_alive
    with engine_of() as engine:
        answer = Answer(engine, tiny_prompt(8), tokens=2_000)
        answer.next()
        engine.stop(grace=0)
        assert answer.reason == "cancelled"


def test_what_loading_raises_is_raised_by_start():
    def load():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        Engine(load).start()


def test_a_model_that_cannot_branch_decodes_plainly(monkeypatch, caplog):
    model = build("llama")
    monkeypatch.setattr(
        "redrafter_mlx.target.adapter.parity_of",
        lambda target: (_ for _ in ()).throw(UserError("llama cannot be a target: a test")),
    )
    with engine_of() as engine:
        assert Answer(engine, tiny_prompt(8)).tokens
        assert engine.served.target.branching is False
    assert "plain decoding, because llama cannot be a target" in caplog.text
    del model


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5", "falcon_h1"])
def test_what_is_kept_outlives_the_process(family, tmp_path):
    options = EngineOptions(prompt_cache_dir=str(tmp_path / "new" / "directory"))
    first = tiny_prompt(40)
    with engine_of(family, united, options=options) as engine:
        prompt = first + Answer(engine, first).tokens + tiny_prompt(9, seed=3)
    with engine_of(family, united, options=options) as engine:
        answer = Answer(engine, prompt)
        assert answer.cached > len(first)
        assert answer.tokens == plain(family, prompt)


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_files_of_kept_texts(tmp_path, caplog):
    """Those of the least use go, broken ones are told, those of other models stay."""
    options = EngineOptions(prompt_cache_dir=str(tmp_path))
    with engine_of(options=options) as engine:
        Answer(engine, tiny_prompt(30, seed=1)).finish()
        Answer(engine, tiny_prompt(30, seed=2)).finish()
    one, two = files(tmp_path)
    with engine_of("gemma3_text", options=options) as engine:
        Answer(engine, tiny_prompt(30, seed=1)).finish()
    assert len(files(tmp_path)) == 3
    (tmp_path / one).write_bytes((tmp_path / one).read_bytes()[:-100])
    assert not caplog.messages
    with engine_of(options=options) as engine:
        assert engine.status()["prefixes"] == 1
        engine.cache_bytes = 0
        Answer(engine, [1]).finish()
    assert f"{one} is left out" in caplog.text
    assert len(files(tmp_path)) == 1
    assert one not in files(tmp_path)
    assert two not in files(tmp_path)


def test_a_directory_that_cannot_be_written_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("not a directory")
    with engine_of(options=EngineOptions(prompt_cache_dir=str(tmp_path / "file"))) as engine:
        Answer(engine, tiny_prompt(30)).finish()
    assert "prefixes cannot be saved in" in caplog.text


def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    options = EngineOptions(prompt_cache_dir=str(tmp_path))
    with engine_of(options=options) as engine:
        Answer(engine, tiny_prompt(30)).finish()
    before = files(tmp_path)

    def full(path, *_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with engine_of(options=options) as engine:
        Answer(engine, tiny_prompt(30, seed=7)).finish()
    assert files(tmp_path) == before
