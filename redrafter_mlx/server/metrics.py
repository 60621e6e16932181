"""Counts for Prometheus, in its text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from redrafter_mlx.engine import Engine

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "redrafter_"
_TOTALS = {
    "prompt_tokens": "Tokens of prompts, those known from earlier texts included",
    "cached_tokens": "Tokens of prompts that were known from earlier texts",
    "tokens": "Tokens of answers",
    "drafted_tokens": "Tokens that were drafted",
    "accepted_tokens": "Drafted tokens that the model said as well",
    "rounds": "Rounds of drafting and verifying",
    "prompt_seconds": "Seconds spent on reading prompts",
    "decode_seconds": "Seconds spent on answering",
}
_GAUGES = {
    "running": "Requests that have their turns",
    "waiting": "Requests that wait for their first turn",
    "prefixes": "Texts that are kept for later prompts",
    "prefix_bytes": "Memory of their caches",
}


class Metrics:
    """What the server counts; the engine's own counts come with them."""

    def __init__(self):
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.gone = 0

    def text(self, engine: Engine) -> str:
        """Everything, one line a value."""
        lines: list[str] = []
        totals = engine.totals
        for name, told in _TOTALS.items():
            lines += _metric(f"{name}_total", told, "counter", [("", getattr(totals, name))])
        finished = [(f'{{reason="{reason}"}}', count) for reason, count in
                    sorted(totals.finished.items())]  # fmt: skip
        lines += _metric("requests_finished_total", "Requests that ended", "counter", finished)
        for name, value in engine.status().items():
            lines += _metric(name, _GAUGES.get(name, name), "gauge", [("", value)])
        responses = [
            (f'{{route="{route}",status="{status}"}}', count)
            for (route, status), count in sorted(self.responses.items())
        ]
        lines += _metric("http_responses_total", "HTTP responses", "counter", responses)
        gone = [("", self.gone)]
        lines += _metric("http_clients_gone_total", "Clients that did not wait", "counter", gone)
        return "\n".join(lines) + "\n"


def _metric(name: str, told: str, kind: str, values: Iterable[tuple[str, float]]) -> list[str]:
    name = _PREFIX + name
    shown = [f"{name}{labels} {value:g}" if isinstance(value, float) else f"{name}{labels} {value}"
             for labels, value in values]  # fmt: skip
    return [f"# HELP {name} {told}.", f"# TYPE {name} {kind}", *shown]
