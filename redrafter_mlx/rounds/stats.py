"""What a run cost and yielded."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx

from redrafter_mlx.rounds.round import Step


@dataclass
class Stats:
    """Counts and times of one generation, up to date at any moment.

    cached_tokens tokens of the prompt that were known from earlier texts
    rule          by which drafts were verified
    accepted_at   rounds that accepted at least 1, 2, ... drafted tokens
    nodes         verified, the root of each tree included
    drafted       tokens that were proposed and verified
    sizes         rounds by the nodes of their tree; 1: nothing was drafted, or nothing worth a row
    *_seconds     wall time: `decode` of all rounds, `draft` and `verify` parts of it
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    rule: str = "match"
    prompt_seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    nodes: int = 0
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    decode_seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter, repr=False)

    def end_prompt(self) -> None:
        """The prompt is processed."""
        now = time.perf_counter()
        self.prompt_seconds, self._began = now - self._began, now

    def read(self, step: Step) -> list[int]:
        """The step's tokens; waiting for them counts as verification."""
        began = time.perf_counter()
        tokens = step.tokens
        self.draft_seconds += step.draft_seconds
        self.verify_seconds += step.verify_seconds + time.perf_counter() - began
        self.rounds += 1
        self.nodes += step.nodes
        self.drafted += step.drafted
        self.sizes[step.nodes] = self.sizes.get(step.nodes, 0) + 1
        return tokens

    def count(self, drafted: bool, place: int) -> None:
        """One more token of the text: the `place`-th of its round, drafted or the target's own."""
        self.tokens += 1
        self.decode_seconds = time.perf_counter() - self._began
        if drafted:
            self.accepted_at += [0] * (place + 1 - len(self.accepted_at))
            self.accepted_at[place] += 1

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens read per second."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second of decoding."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def peak_memory(self) -> float:
        """The most memory that the process's arrays have taken so far, in GB."""
        return mx.get_peak_memory() / 1e9

    def as_dict(self) -> dict:
        """Everything, for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "prompt_tps": round(self.prompt_tps, 3),
            "generation_tokens": self.tokens,
            "generation_tps": round(self.generation_tps, 3),
            "rounds": self.rounds,
            "tokens_per_round": round(self.tokens_per_round, 4),
            "drafted_tokens": self.drafted,
            "accepted_tokens": sum(self.accepted_at),
            "mean_nodes": round(self.nodes / self.rounds, 2) if self.rounds else 0.0,
            "accepted_at": self.accepted_at,
            "draft_seconds": round(self.draft_seconds, 4),
            "verify_seconds": round(self.verify_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "peak_memory": round(self.peak_memory, 3),
            "rule": self.rule_name,
        }

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.tokens} tokens, {self.generation_tps:.1f} tokens/s, {self.rounds} rounds, "
            f"{self.tokens_per_round:.2f} tokens per round"
            + ("" if self.rule == "match" else f", rule {self.rule_name}")
        )

    @property
    def rule_name(self) -> str:
        """The rule, labelled if it changes what the model says."""
        return f"{self.rule} (lossy)" if self.rule == "typical" else self.rule

    def report(self) -> str:
        """Several lines, with a bar for each depth of the drafts."""
        total = self.decode_seconds or 1.0
        rest = max(0.0, total - self.draft_seconds - self.verify_seconds)
        lines = [
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec",
            f"Generation: {self.tokens} tokens, {self.generation_tps:.3f} tokens-per-sec",
            f"Rounds: {self.rounds}, {self.tokens_per_round:.2f} tokens per round, "
            f"{self.nodes / max(self.rounds, 1):.1f} nodes per round, "
            f"{self.sizes.get(1, 0)} without a tree",
            f"Time: draft {self.draft_seconds / total:.1%}, verify "
            f"{self.verify_seconds / total:.1%}, rest {rest / total:.1%}",
        ]
        for depth, rounds in enumerate(self.accepted_at, start=1):
            share = rounds / self.rounds
            lines.append(f"Accepted at depth {depth}: {share:6.1%} {'#' * round(40 * share)}")
        if self.rule != "match":
            lines.append(f"Rule: {self.rule_name}")
        lines.append(f"Peak memory: {self.peak_memory:.3f} GB")
        return "\n".join(lines)
