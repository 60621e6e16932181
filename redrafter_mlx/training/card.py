"""The model card of a trained drafter."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from redrafter_mlx.training.shards import parts

if TYPE_CHECKING:
    from redrafter_mlx.training.run import TrainingRun


def card(run: TrainingRun, model: str, command: str, table: str, drawn: bool) -> str:
    """README.md: what the head is, how it was made, and how well it does.

    model    the target as the user named it
    command  that made it
    table    of its report, and how the time was spent
    drawn    whether there is a picture
    """
    c, progress = run.config, run.progress
    manifest = json.loads((parts(run.places.data)[0] / "data.json").read_text(encoding="utf-8"))
    output = (
        "rows of the target's own head: nothing is stored for it, and the ids of each prompt are "
        "proposed too"
        if run.recipe.tied
        else "rows of its own"
    )
    shape = {k: v for k, v in dataclasses.asdict(c).items() if v not in (None, False, ())}
    base = [f"base_model: {model}"] if "/" in model and not model.startswith((".", "/")) else []
    lines = [
        "---", "library_name: mlx", "pipeline_tag: text-generation", *base, "tags:", "- mlx",
        "- redrafter", "- speculative-decoding", f"- {run.recipe.name}", "---", "",
        f"# Draft head for {model}", "",
        f"{run.recipe.about}: it proposes tokens that its target then checks. It drafts well only "
        "for the target it was trained with, at that quantisation.", "",
        f"- Head: {run.parameters / 1e6:.2f} M parameters; output: {output}. Its shape: "
        f"`{json.dumps(shape, default=str)}`.",
        f"- Draft vocabulary: {c.draft_vocab_size:,} of {c.vocab_size:,} ids, "
        f"{run.vocabulary.coverage:.1%} of held-out answers (with the prompt's ids "
        f"{run.vocabulary.with_prompt:.1%}).",
        f"- Data: {run.shards.tokens:,} tokens that the target wrote; fingerprint "
        f"`{json.dumps(manifest.get('target'), sort_keys=True)}`; made with "
        f"`{json.dumps(manifest.get('options'), sort_keys=True)}`.",
        f"- Training: {progress.steps:,} steps of {run.positions_per_step:,} positions in "
        f"{progress.seconds / 60:.0f} minutes; last loss {progress.loss:.3f}.",
        f"- Settings: `{json.dumps(run.settings, sort_keys=True)}`.", "",
        "```shell", command, "```", "", table,
    ]  # fmt: skip
    if drawn:
        lines += ["", "![loss and tokens per round over time](training.png)"]
    return "\n".join(lines) + "\n"
