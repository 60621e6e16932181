"""Counts for Prometheus, in its text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from redrafter_mlx.engine import Engine

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TOTALS = {
    "prompt_tokens": "Tokens of prompts, cached ones included",
    "cached_tokens": "Tokens of prompts that were in the KV cache of an earlier text",
    "tokens": "Tokens of answers",
    "drafted_tokens": "Draft tokens",
    "accepted_tokens": "Draft tokens that the model accepted",
    "rounds": "Rounds of drafting and verification",
    "prompt_seconds": "Seconds spent on prefill",
    "decode_seconds": "Seconds spent on decoding",
}
_GAUGES = {
    "running": "Requests that are being answered",
    "waiting": "Requests that wait to be answered",
    "prefixes": "Texts whose KV caches are kept for later prompts",
    "prefix_bytes": "Memory of these KV caches",
}


class Metrics:
    """The server's own counts; `text` adds those of its engine."""

    def __init__(self):
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.gone = 0

    def text(self, engine: Engine) -> str:
        """All metrics, one value per line."""
        lines: list[str] = []
        totals = engine.totals
        for name, help in _TOTALS.items():
            lines += _metric(f"{name}_total", help, "counter", [("", getattr(totals, name))])
        finished = [(f'{{reason="{reason}"}}', count) for reason, count in
                    sorted(totals.finished.items())]  # fmt: skip
        lines += _metric("requests_finished_total", "Requests finished", "counter", finished)
        for name, value in engine.status().items():
            lines += _metric(name, _GAUGES.get(name, name), "gauge", [("", value)])
        responses = [
            (f'{{route="{route}",status="{status}"}}', count)
            for (route, status), count in sorted(self.responses.items())
        ]
        lines += _metric("http_responses_total", "HTTP responses", "counter", responses)
        gone, help = [("", self.gone)], "Clients that left before their answer was complete"
        lines += _metric("http_clients_gone_total", help, "counter", gone)
        return "\n".join(lines) + "\n"


def _metric(name: str, help: str, kind: str, values: Iterable[tuple[str, float]]) -> list[str]:
    name = f"redrafter_{name}"
    shown = [f"{name}{labels} {value:g}" if isinstance(value, float) else f"{name}{labels} {value}"
             for labels, value in values]  # fmt: skip
    return [f"# HELP {name} {help}.", f"# TYPE {name} {kind}", *shown]
