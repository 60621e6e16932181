"""What a first look at a GPU should tell, in a few minutes and one table.

    python -m benchmarks.gpu --output gpu.json
    python -m benchmarks.gpu --max-tokens 16 --per-category 1 --output quick.json

Cold: seconds from starting a process to its second token, beginning with an empty directory for
the kernels that a GPU compiles at first use: mlx-lm's own command, then ours, which finds mlx-lm's
kernels compiled and so adds only its own, then both again. Draft: seconds of a full search over
those of a pass, in one process. Then speed over mlx-lm, greedy and at temperature 1, as
benchmarks.speed measures it (the JSON file is one of its results), and whether texts are equal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.loading.demo import demo_target
from redrafter_mlx.machine.storage import CACHE_VARIABLE
from redrafter_mlx.measuring.measure import measure_drafts, measure_passes
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.target.adapter import adapt

from . import speed
from .machine import write
from .tables import gpu_table

COLD = ("mlx_lm.generate", "redrafter_mlx.generate --no-draft", "redrafter_mlx.generate")
ROWS = (1, 2, 4, 8, 16, 32, 64)


def cold_starts(model: str) -> dict[str, list[float]]:
    """Seconds to the second token by command, cold and warm."""
    path = str(demo_target()) if model == "demo" else model
    found = {words: [] for words in COLD}
    with tempfile.TemporaryDirectory() as root:
        for _ in ("cold", "warm"):
            for words in COLD:
                asked = ["--model", path, "--prompt", "Why is the sky blue?", "--max-tokens", "2"]
                if words == COLD[-1] and model == "demo":
                    asked += ["--drafter", "union:[max_gram,demo]"]
                found[words].append(_seconds([*words.split(), *asked], Path(root)))
                print(f"{words}: {found[words][-1]:.1f} s", file=sys.stderr, flush=True)
    return found


def _seconds(words: Sequence[str], kernels: Path) -> float:
    places = {"TMPDIR": kernels, "MLX_PTX_CACHE_DIR": kernels, CACHE_VARIABLE: kernels}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False,
        env={**os.environ, **{name: str(place) for name, place in places.items()}},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return time.perf_counter() - began


def prices(bench: speed.SpeedBench, turns: int = 5) -> dict:
    """Seconds of passes by rows, and of the full search, after the same text."""
    text, target = bench.filler(200), adapt(bench.model)
    full = Setting(DraftOptions.beam_width, DraftOptions.beam_length)
    passes = measure_passes(target, text, ROWS, turns).typical
    drafter = bench.drafters[bench.flags.drafters[0]]
    draft = measure_drafts(target, drafter, text, [full], turns).typical
    return {
        "passes": dict(zip(ROWS, passes.tolist(), strict=True)),
        "draft": float(draft[0]),
    }


def parse(args: list[str] | None) -> argparse.Namespace:
    """The flags of benchmarks.speed, with other defaults."""
    given = list(sys.argv[1:] if args is None else args)
    wanted = {
        "--drafters": ["demo", "max_gram", "auto"],
        "--budgets": ["auto"],
        "--temps": ["0", "1"],
        "--per-category": ["3"],
        "--max-tokens": ["64"],
        "--cost-repeats": ["3"],
    }
    for name, values in wanted.items():
        if name not in given:
            given += [name, *values]
    return speed.parse(given)


def main(args: list[str] | None = None) -> int:
    flags = parse(args)
    starts = cold_starts(flags.model)
    bench = speed.SpeedBench(flags)
    paid = prices(bench)
    result = speed.measure(bench, flags)
    result["gpu"] = {"starts": starts, **paid}
    write(result, flags.output)
    print(gpu_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
