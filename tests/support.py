"""Scripted drafters, tiny targets and wrong rules for tests of the loop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from families import build
from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.generation import Generation
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Outcome, Step, Verdict
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.adapter import adapt

BUDGET = FixedBudget(width=4, length=5, nodes=16)


class ScriptedDrafter:
    """Knows the text that plain decoding gives, and proposes `right` tokens of it each round.

    text   prompt and answer
    right  how many tokens of the draft are the target's own; `wrong` ones come after them
    decoys put a wrong sibling before every right token, so that the path is not the first rows
    """

    def __init__(self, text: Sequence[int], right: int, wrong: int = 0, decoys: bool = False):
        self.text, self.right, self.wrong, self.decoys = list(text), right, wrong, decoys
        self.steps: list[Step] = []

    def propose(self, context: Context, budget: FixedBudget) -> TokenTree:
        at = context.position
        chain = self.text[at + 1 : at + 1 + self.right]
        chain += [self._other(at + 1 + len(chain) + i) for i in range(self.wrong)]
        tokens, parents, scores, parent = [], [], [], -1
        for depth, token in enumerate(chain, start=1):
            if self.decoys:
                tokens.append(self._other(at + depth, token))
                parents.append(parent)
                scores.append(-depth)
            tokens.append(token)
            parents.append(parent)
            scores.append(-depth - 0.5)
            parent = len(tokens) - 1
        return TokenTree.best(self.text[at], tokens, parents, scores, budget=len(tokens) + 1)

    def _other(self, at: int, token: int = 0) -> int:
        """A token that is neither the true one at this place nor `token`."""
        true = self.text[at] if at < len(self.text) else 0
        return next(t for t in range(5) if t not in (true, token))

    def observe(self, step: Step) -> None:
        self.steps.append(step)

    def reset(self) -> None:
        self.steps.clear()

    def fork(self, length: int) -> ScriptedDrafter:
        return ScriptedDrafter(self.text, self.right, self.wrong, self.decoys)


class Numbers:
    """A tokenizer for an engine with a tiny target: each token is its number, a space before it."""

    def __init__(self, eos: Sequence[int] = ()):
        self.eos_token_ids = set(eos)

    @property
    def detokenizer(self) -> Numbers.Detokenizer:
        return self.Detokenizer()

    class Detokenizer:
        last_segment = ""

        def add_token(self, token: int) -> None:
            self.last_segment = f" {token}"

        def finalize(self) -> None:
            pass


def random_drafter(model, seed: int = 0, d2t=None, **shape) -> RecurrentDrafter:
    """A recurrent drafter with random weights for a target."""
    target = adapt(model)
    draft_vocab_size = target.vocab_size if d2t is None else len(d2t)
    config = HeadConfig(
        **{
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "exit_dim": (1 if shape.get("tied_output") else 2) * target.hidden_size,
            "num_blocks": 1,
            "rnn": True,
            "draft_vocab_size": draft_vocab_size,
        }
        | shape
    )
    mx.random.seed(seed)
    head = RecurrentHead(config)
    ids = mx.arange(draft_vocab_size, dtype=mx.int32) if d2t is None else mx.array(d2t)
    view = target.tap(config.fused_layers, whole_text=bool(config.lookback_heads))
    output = target.output_layer if config.tied_output else None
    return RecurrentDrafter(head, ids, target.embed, output, view)


def generation(model, prompt, drafter=None, max_tokens=40, eos=(), draft=None, kv=None,
               prompt_cache=None, **sampling):  # fmt: skip
    """A run of the loop; iterate it for Tokens. kv: options of its cache."""
    return Generation(
        model,
        prompt,
        drafter,
        generation=GenerationOptions(max_tokens=max_tokens, **(kv or {})),
        sampling=SamplingOptions(**sampling),
        draft=draft or DraftOptions(budget=16),
        eos_token_ids=eos,
        prompt_cache=prompt_cache,
    )


def ids(run: Generation) -> list[int]:
    return [token.id for token in run]


def tiny_prompt(n: int = 12, seed: int = 0, vocab: int = 97) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


def accept_everything(rule):
    """A wrong rule: takes the likeliest drafted path whatever the target says."""

    def wrong(tree: TokenTree, outcome: Outcome, context: Context) -> Verdict:
        path = [0]
        while children := tree.children[path[-1]]:
            path.append(min(children.values()))
        pending = mx.argmax(outcome.logits[path[-1]])[None]
        return Verdict(path, pending, token=pending.item())

    return wrong


def stop_one_short(rule):
    """A wrong rule: emits a draft's last accepted token but forgets to descend into it."""

    def wrong(tree: TokenTree, outcome: Outcome, context: Context) -> Verdict:
        verdict = rule(tree, outcome, context)
        if len(verdict.path) == 1:
            return verdict
        return replace(verdict, path=list(verdict.path)[:-1])

    return wrong


def grammar_model(seed: int = 0):
    """A target that knows one rule by heart: each token is always followed by the same other one.

    Returns the model and the rule (V,), token -> next token. Any head can learn it.
    """
    model = build("llama")
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    vocab, hidden = model.model.embed_tokens.weight.shape
    rng = np.random.default_rng(seed)
    order = rng.permutation(vocab)
    rule = np.empty(vocab, int)
    rule[order] = np.roll(order, -1)  # one cycle through all tokens
    embedding = rng.normal(size=(vocab, hidden)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    head = np.empty_like(embedding)
    head[rule] = 3 * embedding
    model.model.embed_tokens.weight = mx.array(embedding)
    model.lm_head.weight = mx.array(head)
    return model, rule


class TinyTokenizer:
    """A tokenizer for the tiny targets: a token for each printable character, and marks for turns.

    Ids 0 to 93 are the characters from "!" on and the new line; 94 to 96 open a turn, end one and
    begin a text. Its template has a place for a system turn.
    """

    OPEN, END, BOS = 94, 95, 96

    def __init__(self, chat: bool = True):
        self._marks = {"<open>": self.OPEN, "<end>": self.END, "<bos>": self.BOS}
        self.chat_template = "tiny" if chat else None
        self.eos_token_ids = {self.END}
        self.bos_token_id = self.BOS

    def get_added_vocab(self):
        return self._marks

    def get_vocab(self):
        return {self.decode([i]): i for i in range(94)} | self._marks

    def decode(self, ids):
        return "".join("\n" if i == 93 else chr(33 + i) for i in ids)

    def encode(self, text, add_special_tokens=True):
        pieces = re.findall(r"<open>|<end>|<bos>|.", text.replace(" ", "_"), flags=re.DOTALL)
        return [self._marks.get(piece) or self._character(piece) for piece in pieces]

    def _character(self, piece):
        return 93 if piece == "\n" else min(ord(piece) - 33, 93)

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
        letter = {"system": "S", "user": "U", "assistant": "A"}
        turns = [f"<open>{letter[m['role']]}:{m['content']}<end>" for m in messages]
        return "".join(turns) + ("<open>A:" if add_generation_prompt else "")
