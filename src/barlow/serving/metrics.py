"""The metrics that Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("barlow_requests", "answers", ["path", "status"], registry=registry)
        self.latency = Histogram("barlow_seconds", "time to the answer", ["path"], buckets=SECONDS, registry=registry)
        self.rejects = Counter("barlow_rejects", "requests or images refused", ["reason"], registry=registry)
        self.batch = Histogram("barlow_batch_size", "images in a batch", buckets=BATCHES, registry=registry)
        self.waited = Histogram("barlow_queue_seconds", "time in the queue", buckets=SECONDS, registry=registry)
        self.queue = Gauge("barlow_queue", "images that wait", registry=registry)
        self.reloads = Counter("barlow_reloads", "replacements of the model", ["result"], registry=registry)
        self.model = Gauge("barlow_model_info", "the model that answers", ["version", "space"], registry=registry)
        self.index = Gauge("barlow_index_items", "images in the index; 0: no search", registry=registry)
        self._series = cache(self._series_of)

    def _series_of(self, path: str, status: int) -> tuple[Callable[[], None], Callable[[float], None]]:
        return self.requests.labels(path, str(status)).inc, self.latency.labels(path).observe

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer and its time; `path` is a route's path, because every new label stays in memory."""
        count, observe = self._series(path, status)
        count()
        observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
