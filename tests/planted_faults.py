"""Planted faults: each breaks one rule of the product, and `pytest` has to notice.

python tests/planted_faults.py            # all of them, one after the other
python tests/planted_faults.py trail      # those whose name has the word in it

Each fault is planted in a copy of the repository. The test files that are likeliest to notice run
first, and all others after them if they do not. Exit code 1 if one slips through.
`tests/test_planted_faults.py` checks that each can still be planted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Fault:
    """One line that is made wrong.

    name   the rule that it breaks
    path   of the file; `right` occurs in it once and becomes `wrong`
    first  test files that are likeliest to notice
    """

    name: str
    path: str
    right: str
    wrong: str
    first: tuple[str, ...]


FAULTS = (
    Fault(
        "mask: a row sees its parent's elder sibling",
        "redrafter_mlx/target/lineage.py",
        "mask[i] |= mask[self.parents[i]]",
        "mask[i] |= mask[max(self.parents[i], i - 1)]",
        ("test_target.py", "test_same_text.py"),
    ),
    Fault(
        "position: a tree's rows stand one too late",
        "redrafter_mlx/target/cache.py",
        "mx.array(length + tree.depths)",
        "mx.array(length + tree.depths + 1)",
        ("test_target.py", "test_same_text.py"),
    ),
    Fault(
        "noise: depends on where a token lies in its tree",
        "redrafter_mlx/rounds/verification.py",
        "token = self.sampler.choose(rows[path[-1]], context.position + len(path), history)",
        "token = self.sampler.choose(rows[path[-1]], context.position + 1 + path[-1], history)",
        ("test_same_text.py",),
    ),
    Fault(
        "commit: the last accepted row is forgotten where a path must move",
        "redrafter_mlx/target/cache.py",
        "rows = mx.array([base + row for row in path[moved:]])",
        "rows = mx.array([base + row for row in [*path[moved:-1], path[moved]]])",
        ("test_target.py", "test_same_text.py"),
    ),
    Fault(
        "commit: a recurrent state is folded to a path's first row",
        "redrafter_mlx/target/state.py",
        "self._kept[slot] = after(path[-1])",
        "self._kept[slot] = after(path[0])",
        ("test_hybrids.py",),
    ),
    Fault(
        "trail: rows come in reverse after a commit",
        "redrafter_mlx/target/adapter.py",
        "context.trail.add(outcome.hidden[mx.array(path)])",
        "context.trail.add(outcome.hidden[mx.array(path[::-1])])",
        ("test_shown.py",),
    ),
    Fault(
        "shown: the state before the last accepted token instead of its own",
        "redrafter_mlx/target/adapter.py",
        "hidden=outcome.hidden[path[-1] : path[-1] + 1]",
        "hidden=outcome.hidden[path[0] : path[0] + 1]",
        ("test_shown.py",),
    ),
    Fault(
        "stop: the stop string itself is part of the text",
        "redrafter_mlx/stream.py",
        "            self.stopped_by = self._stops[self._state[0]]",
        "            self.stopped_by = new = self._stops[self._state[0]]",
        ("test_stream.py",),
    ),
    Fault(
        "profile: what earlier runs left is ignored",
        "redrafter_mlx/measuring/knowledge.py",
        "        stored = load(self._identity)\n        self._costs: LiveCosts | None = None",
        "        stored = None\n        self._costs: LiveCosts | None = None",
        ("test_profile.py",),
    ),
    Fault(
        "converter: two tensors are swapped",
        "convert/layouts.py",
        "module = self.modules.get(module, module)",
        'module = {"rnn_u": "rnn_w", "rnn_w": "rnn_u"}.get(module, module)',
        ("test_convert.py", "test_convert_torch.py"),
    ),
    Fault(
        "penalty: tokens of the drafted path do not count",
        "redrafter_mlx/rounds/verification.py",
        "            path.append(child)\n            history.append(token)\n\n\nclass Rejection",
        "            path.append(child)\n\n\nclass Rejection",
        ("test_same_text.py",),
    ),
    Fault(
        "end of text: a drafted one does not end it",
        "redrafter_mlx/generation.py",
        "if token in self._eos_token_ids:",
        "if token in self._eos_token_ids and not self.stats.accepted_at:",
        ("test_stream.py",),
    ),
    Fault(
        "engine: a prefix is used one token too far",
        "redrafter_mlx/engine/prefixes.py",
        "    most = min(common - UNREAD, donor.caches.length)",
        "    most = min(common + 1, donor.caches.length)",
        ("test_engine.py",),
    ),
    Fault(
        "engine: a cancelled request goes on",
        "redrafter_mlx/engine/engine.py",
        "        ticket = run.ticket\n        if ticket.is_cancelled:",
        "        ticket = run.ticket\n        if ticket.is_cancelled and not run.said:",
        ("test_engine.py",),
    ),
    Fault(
        "drafter: what a fork knows of the text is one place too much",
        "redrafter_mlx/drafters/attention.py",
        "places = max(length - self._start, 0)",
        "places = max(length - self._start + 1, 0)",
        ("test_tokens_a_round.py",),
    ),
    Fault(
        "drafter: a head reads the embedding of the token before",
        "redrafter_mlx/drafters/attention.py",
        "tokens = transcript.tokens[first + 1 : first + 1 + len(captured)]",
        "tokens = transcript.tokens[first : first + len(captured)]",
        ("test_published.py", "test_heads.py"),
    ),
    Fault(
        "drafter: a head does not see the last token of the text",
        "redrafter_mlx/drafters/attention.py",
        "mx.array([self._layers[0].offset])",
        "mx.array([self._layers[0].offset - 1])",
        ("test_tokens_a_round.py",),
    ),
    Fault(
        "drafter: a head goes on from the first row of a path and not its last",
        "redrafter_mlx/drafters/attention.py",
        "self._last = self.take_in(tokens, captured)[-1:]",
        "self._last = self.take_in(tokens, captured)[:1]",
        ("test_tokens_a_round.py",),
    ),
    Fault(
        "drafter: places to look back at are keyed by the wrong state after a commit",
        "redrafter_mlx/drafters/text.py",
        "self._before, self._places = hidden[-1:], end",
        "self._before, self._places = hidden[:1], end",
        ("test_tokens_a_round.py",),
    ),
    Fault(
        "drafter: a draft model keeps the first token that was rejected",
        "redrafter_mlx/drafters/model.py",
        "if held[i] != wanted[i]), most)",
        "if i and held[i] != wanted[i]), most)",
        ("test_tokens_a_round.py",),
    ),
    Fault(
        "drafter: Max-Gram goes on from one token too late",
        "redrafter_mlx/drafters/max_gram.py",
        "tokens = text[start : start + most]",
        "tokens = text[start + 1 : start + 1 + most]",
        ("test_max_gram.py",),
    ),
    Fault(
        "quantised caches: they begin a pass late",
        "redrafter_mlx/target/cache.py",
        "self._length >= how.start:",
        "self._length > how.start:",
        ("test_kv_quantization.py",),
    ),
    Fault(
        "resume: the optimiser begins anew",
        "redrafter_mlx/training/loop.py",
        'self._optimizer.state = tree_unflatten(part("optimizer."))',
        'tree_unflatten(part("optimizer."))',
        ("test_training.py", "test_train_command.py"),
    ),
)


def planted(fault: Fault, root: Path) -> None:
    """Plant a fault in a copy of the repository."""
    path = root / fault.path
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.right) == 1, f"{fault.name}: {text.count(fault.right)} places"
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def noticed(fault: Fault) -> str | None:
    """The first test that fails with the fault; None if all pass."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for each in _files():
            (root / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / each, root / each)
        planted(fault, root)
        for tests in ([f"tests/{file}" for file in fault.first], ["tests"]):
            if failed := _first_failure(root, tests):
                return failed
    return None


def _files() -> list[str]:
    """Those of the repository that exist, new ones included."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def _first_failure(root: Path, tests: list[str]) -> str | None:
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=root, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"pytest ended with code {done.returncode}"


def main() -> int:
    words = sys.argv[1:]
    slipped = 0
    for fault in FAULTS:
        if words and not any(word in fault.name for word in words):
            continue
        began = time.monotonic()
        found = noticed(fault)
        slipped += found is None
        seconds = time.monotonic() - began
        print(f"{fault.name}: {found or 'SLIPPED THROUGH'} ({seconds:.0f} s)", flush=True)
    print(f"{slipped} slipped through")
    return int(slipped > 0)


if __name__ == "__main__":
    sys.exit(main())
