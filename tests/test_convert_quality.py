"""What quantising costs a real head on a real target: the shipped drafter, the demo model."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import batch_generate

from convert_heads import convert
from redrafter_mlx.loading import drafters, hub
from redrafter_mlx.rounds.round import Transcript
from redrafter_mlx.target.adapter import adapt

ROOT = Path(__file__).parents[1]
HEAD = ROOT / "redrafter_mlx" / "demo_drafter"
DEPTHS = 4


@pytest.fixture(scope="module")
def states(demo_path):
    """The target; its hidden states at P places (P, c), the embeddings of the next DEPTHS tokens
    (P, DEPTHS, h), and what the target says after each of those (P, DEPTHS)."""
    model, tokenizer = hub.load("demo")
    drafters.load_drafter("demo", model)  # tells which of its layers are read
    target = adapt(model)
    texts = (ROOT / "benchmarks" / "prompts.jsonl").read_text().splitlines()
    messages = [[{"role": "user", "content": json.loads(text)["turns"][0]}] for text in texts]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in messages]
    prompts = sorted(prompts, key=len)[:6]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=32).texts
    hidden, embeddings, says = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = mx.array(prompt + tokenizer.encode(answer, add_special_tokens=False))
        caches = target.empty_caches()
        caches.begin(len(tokens))
        outcome, e = target.forward(tokens[None], caches), target.embed(tokens)
        h, best = outcome.hidden[0], mx.argmax(outcome.logits[0], axis=-1)
        place = mx.arange(len(prompt) - 1, len(tokens) - DEPTHS)
        after = place[:, None] + 1 + mx.arange(DEPTHS)
        hidden.append(h[place])
        embeddings.append(e[after])
        says.append(best[after])
    return model, *(mx.concatenate(each) for each in (hidden, embeddings, says))


def likeliest(path: Path, states) -> np.ndarray:
    """The head's likeliest token ids, (P, DEPTHS), without looking back."""
    model, hidden, embeddings, _ = states
    drafter = drafters.load_drafter(str(path), model)
    d2t, rows = drafter.vocabulary.of(Transcript([0]))
    steps, state, found = drafter.head.steps(hidden), None, []
    for depth in range(DEPTHS):
        state = steps.advance(state, embeddings[:, depth])
        found.append(d2t[mx.argmax(drafter.vocabulary.project(steps.logits(state), rows), axis=-1)])
    return np.array(mx.stack(found, axis=1))


@pytest.fixture(scope="module")
def full(states) -> np.ndarray:
    """What the head says as it is."""
    return likeliest(HEAD, states)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("bits", "share"), [(4, 0.90), (8, 0.98)])
def test_quantised_heads_keep_the_agreement_with_the_target(
    bits, share, group_size, states, full, tmp_path
):
    packed = convert(HEAD, tmp_path / "out", "--quantize", bits, "--group-size", group_size)
    says = np.array(states[3])
    found = likeliest(packed, states)
    before, after = (full == says).mean(), (found == says).mean()
    same = (full == found).mean()
    print(f"\n{bits} bits, groups of {group_size}: agreement {before:.4f} -> {after:.4f} "
          f"({after / before:.1%} kept), same token as the full head {same:.1%}, "
          f"{says.size} places")  # fmt: skip
    assert before > 0.1, "the full head has to know something"
    assert after >= share * before
