"""Numbers for Prometheus: counted while the daemon works, completed from its status at each scrape."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from edge_runtime.daemon.cluster_metrics import cluster_gauges
from edge_runtime.daemon.requests import ContributionCounts, Usage
from edge_runtime.daemon.status import Status

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus' text format
# From an idle desktop with the demo model to a full queue on a single-board computer.
_WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 5.0)
_CONTRIBUTION_OUTCOMES = ("on_time", "late", "lost", "recomputed")

# The moment at which each counter began would double the page, and the daemon's start is there already.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """What the daemon counts. Every instance has a registry of its own, so that two daemons do not mix."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self._tally: Tally[str] = Tally()
        self._requests = Counter(
            "edgert_requests", "Requests that have ended, by outcome.", ["outcome"], registry=registry
        )
        self._prompt_tokens = Counter(
            "edgert_prompt_tokens", "Tokens of the prompts that were answered.", registry=registry
        )
        self._generated_tokens = Counter(
            "edgert_generated_tokens",
            "Tokens generated, those of cancelled requests included.",
            registry=registry,
        )
        self._reused_tokens = Counter(
            "edgert_reused_tokens", "Prompt tokens that were in the KV cache already.", registry=registry
        )
        contributions = Counter(
            "edgert_contributions",
            "Contributions of other devices to answers, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        # Made before the first one comes, so that a rate is 0 until then and not absent.
        self._contributions = {outcome: contributions.labels(outcome) for outcome in _CONTRIBUTION_OUTCOMES}
        self._queue = Histogram(
            "edgert_queue_seconds",
            "From a request's arrival until its work began.",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self._first_token = Histogram(
            "edgert_time_to_first_token_seconds",
            "From a request's arrival until its first token.",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self._token = Histogram(
            "edgert_token_seconds",
            "Mean time of an answer's tokens after the first, one observation for each answer.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )

    def tokens(self, count: int) -> None:
        """Count tokens that have just been generated."""
        self._generated_tokens.inc(count)

    def finished(self, outcome: str, usage: Usage | None) -> None:
        """Count a request that has ended.

        Args:
            outcome: ``stop``, ``length``, ``cancelled`` or an error's code.
            usage: what it took; None where it never came to an end of its own. Its generated tokens are not
                added: :meth:`tokens` has counted them.
        """
        self._tally[outcome] += 1
        self._requests.labels(outcome).inc()
        if usage is None:
            return
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._reused_tokens.inc(usage.reused_tokens)
        self._queue.observe(usage.queue_seconds)
        if usage.generated_tokens > 0:
            self._first_token.observe(usage.queue_seconds + usage.prefill_seconds)
        if usage.generated_tokens > 1:
            self._token.observe(usage.decode_seconds / (usage.generated_tokens - 1))
        if usage.contributions is not None:
            self._count_contributions(usage.contributions)

    def _count_contributions(self, counts: ContributionCounts) -> None:
        self._contributions["on_time"].inc(counts.on_time)
        self._contributions["late"].inc(sum(counts.late))
        self._contributions["lost"].inc(counts.lost)
        self._contributions["recomputed"].inc(counts.recomputed)

    def finished_counts(self) -> dict[str, int]:
        """Outcome -> requests that ended so, since the start."""
        return dict(self._tally)

    def render(self, status: Status) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its content type."""
        return generate_latest(_Scrape(self._registry, status)), _CONTENT_TYPE


class _Scrape(Collector):
    """What was counted, and beside it how the daemon is at this moment."""

    def __init__(self, registry: CollectorRegistry, status: Status) -> None:
        self._registry = registry
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield from _gauges(self._status)


def _gauges(status: Status) -> Iterator[Metric]:
    """The status as metrics; a temperature only where the device tells one."""
    about = InfoMetricFamily("edgert_daemon", "The program that answers.")
    about.add_metric([], {"version": status.version, "default_model": status.default_model})
    yield about
    queued = sum(request.state == "queued" for request in status.requests)
    peers = len(status.cluster.members) - 1 if status.cluster else 0  # this device is a member, too
    plain: list[tuple[str, str, float | None]] = [
        ("edgert_ready", "1 if a token was produced lately.", float(status.ready)),
        ("edgert_stopping", "1 while running requests are finished before the end.", float(status.stopping)),
        ("edgert_start_time_seconds", "When the daemon started, seconds since the epoch.", status.started),
        ("edgert_requests_running", "Requests that are being computed.", len(status.requests) - queued),
        ("edgert_requests_queued", "Requests that wait.", queued),
        ("edgert_queue_limit", "Requests that may wait.", status.queue_limit),
        ("edgert_memory_bytes", "Resident memory of the daemon.", status.memory_bytes),
        ("edgert_memory_available_bytes", "Memory free on the device.", status.memory_available_bytes),
        ("edgert_temperature_celsius", "Temperature of the processor.", status.temperature),
        ("edgert_cpu_percent", "Load of all cores since the last status.", status.cpu_percent),
        ("edgert_peers", "Other devices that this one works with.", peers),
        ("edgert_adapters", "Adapters that are applied.", len(status.adapters)),
    ]
    for name, explanation, value in plain:
        if value is not None:
            yield GaugeMetricFamily(name, explanation, value=value)
    yield from _model_gauges(status)
    if status.cluster is not None:
        yield from cluster_gauges(status.cluster)


def _model_gauges(status: Status) -> Iterator[Metric]:
    info = InfoMetricFamily("edgert_model", "Models in memory.", labels=["model"])
    weights = GaugeMetricFamily("edgert_model_weight_bytes", "Memory of a model's weights.", labels=["model"])
    cache = GaugeMetricFamily("edgert_model_kv_bytes", "Memory of a model's full KV cache.", labels=["model"])
    for model in status.models:
        details = {"quantization": model.quantization, "context": str(model.context)}
        details |= {"sequences": str(model.sequences), "threads": str(model.threads)}
        info.add_metric([model.name], details | {"parameters": str(model.parameters)})
        weights.add_metric([model.name], model.weight_bytes)
        cache.add_metric([model.name], model.kv_bytes)
    yield from (info, weights, cache)
