"""Prometheus metrics of a server. The names of patches are labels, so their number is bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ..generation import PrefixCache
from ..patch import Patch
from ..session import BoundValuesStore
from .ticket import Ticket
from .worker import Worker

_MOST_LABELS = 100  # names of patches and sums; what comes later counts as "other"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PACES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The metrics of one server, in a registry of their own. Any thread may count and read.

    Args:
        device: "cpu" or "cuda".
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, device: str) -> None:
        self._registry = CollectorRegistry()
        self._labels: set[str] = set()
        with_patch: dict[str, Any] = {"labelnames": ["patch"], "registry": self._registry}
        self._first = Histogram(
            "tp_first_token_seconds", "Seconds to the first token, waiting included.", buckets=_SECONDS, **with_patch
        )
        self._pace = Histogram(
            "tp_token_seconds", "Seconds per token after the first one.", buckets=_PACES, **with_patch
        )
        self._tokens = Counter("tp_completion_tokens", "Tokens that were generated.", **with_patch)
        self._prompts = Counter("tp_prompt_tokens", "Tokens of prompts.", **with_patch)
        self._ended = Counter(
            "tp_requests", "Answers by how they ended.", labelnames=["patch", "reason"], registry=self._registry
        )
        self._switches = Counter(
            "tp_patch_switches", "Answers whose patch was not that of the answer before.", registry=self._registry
        )
        self._answers = Counter(
            "tp_http_answers", "Answers by HTTP status.", labelnames=["status"], registry=self._registry
        )
        Gauge("tp_device_info", "The device.", labelnames=["device"], registry=self._registry).labels(device).set(1)
        self._last: str | None = None

    def watch(
        self,
        worker: Worker,
        patches: Callable[[], Mapping[str, Patch]],
        converted: BoundValuesStore,
        prefix_cache: PrefixCache | None,
    ) -> None:
        """Report what can be read at any time: rows, queue, patches, converted patches and the prefix cache."""
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("tp_rows", "Requests that run.", lambda: worker.running),
            ("tp_queue", "Requests that wait.", lambda: worker.waiting),
            ("tp_patches", "Patches that are loaded.", lambda: len(patches())),
            (
                "tp_patch_bytes",
                "Bytes of the loaded patches.",
                lambda: sum(patch.memory_bytes for patch in patches().values()),
            ),
            ("tp_converted_patch_bytes", "Bytes of the converted patches that are kept.", lambda: converted.nbytes),
            ("tp_converted_patch_hits", "Bindings of a patch that was converted.", lambda: converted.hits),
            ("tp_converted_patch_misses", "Bindings that converted their patch first.", lambda: converted.misses),
        ]
        if prefix_cache is not None:
            gauges += [
                ("tp_prefix_cache_hits", "Prompts that found a beginning.", lambda: prefix_cache.hits),
                ("tp_prefix_cache_misses", "Prompts that found none.", lambda: prefix_cache.misses),
                ("tp_prefix_cache_bytes", "Bytes of stored keys and values.", lambda: prefix_cache.bytes),
            ]
        for name, text, read in gauges:
            Gauge(name, text, registry=self._registry).set_function(read)

    def ended(self, ticket: Ticket, error: Exception | None) -> None:
        """Count an answer that has ended."""
        label = self._label(ticket.label)
        completion = ticket.completion
        reason = type(error).__name__ if error is not None else completion.finish_reason or "closed"
        self._ended.labels(label, reason).inc()
        if label != self._last:
            self._switches.inc()
            self._last = label
        tokens, first = len(completion.token_ids), completion.seconds_to_first_token
        self._tokens.labels(label).inc(tokens)
        self._prompts.labels(label).inc(completion.prompt_tokens)
        if first is not None:
            self._first.labels(label).observe(first)
            if tokens > 1:
                self._pace.labels(label).observe((completion.seconds - first) / (tokens - 1))

    def answered(self, status: int) -> None:
        """Count an HTTP answer; 499 is a client that hung up before it."""
        self._answers.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text form."""
        return generate_latest(self._registry)

    def _label(self, label: str) -> str:
        """Return the label of a patch or a sum: its names without strengths, of which there are too many."""
        name = "+".join(part.partition("@")[0] for part in label.split("+"))
        if name not in self._labels:
            if len(self._labels) >= _MOST_LABELS:
                return "other"
            self._labels.add(name)
        return name
