"""Metrics: what is counted, and that Prometheus' own parser reads it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.daemon.metrics import Metrics
from edge_runtime.daemon.requests import ContributionCounts, Usage
from edge_runtime.daemon.status import LoadedModel, RequestState, RequestStatus, Status


def request(state: RequestState) -> RequestStatus:
    return RequestStatus("r", "local", "demo", state, prompt_tokens=3, generated_tokens=1, seconds=0.5)


def status(*, temperature: float | None = 51.5, name: str = "demo") -> Status:
    return Status(
        version="0.1.0",
        pid=1,
        started=1000.5,
        ready=True,
        reason="",
        stopping=False,
        default_model="demo",
        models=(LoadedModel(name, 6_000_000, "Q8_0", 512, 4, 1, 6_400_000, 1_000_000),),
        requests=(request("decode"), request("prefill"), request("queued")),
        queue_limit=32,
        finished={},
        prompt_tokens=0,
        generated_tokens=0,
        speed=(),
        memory_bytes=70_000_000,
        memory_available_bytes=900_000_000,
        temperature=temperature,
        cpu_percent=12.0,
    )


def usage(generated: int = 5, contributions: ContributionCounts | None = None) -> Usage:
    return Usage(
        finish_reason="stop",
        seed=1,
        prompt_tokens=7,
        reused_tokens=3,
        generated_tokens=generated,
        queue_seconds=0.25,
        prefill_seconds=0.5,
        decode_seconds=2.0,
        contributions=contributions,
    )


def read(metrics: Metrics, at: Status) -> dict[tuple[str, tuple[str, ...]], float]:
    """(sample, label values) -> value, as Prometheus' parser understands the page."""
    body, content_type = metrics.render(at)
    assert content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_a_finished_request_counts_its_tokens_and_times() -> None:
    metrics = Metrics()
    metrics.tokens(2)
    metrics.tokens(3)
    metrics.finished("stop", usage())
    page = read(metrics, status())
    assert page["edgert_requests_total", ("stop",)] == 1
    assert page["edgert_prompt_tokens_total", ()] == 7
    assert page["edgert_reused_tokens_total", ()] == 3
    assert page["edgert_generated_tokens_total", ()] == 5
    assert page["edgert_queue_seconds_sum", ()] == 0.25
    assert page["edgert_time_to_first_token_seconds_sum", ()] == 0.75
    assert page["edgert_token_seconds_sum", ()] == 0.5  # two seconds for the four tokens after the first


def test_a_refused_request_counts_without_times() -> None:
    metrics = Metrics()
    metrics.finished("overloaded", None)
    metrics.finished("overloaded", None)
    metrics.finished("cancelled", None)
    page = read(metrics, status())
    assert metrics.finished_counts() == {"overloaded": 2, "cancelled": 1}
    assert page["edgert_requests_total", ("overloaded",)] == 2
    assert page["edgert_queue_seconds_count", ()] == 0


def outcomes(metrics: Metrics) -> list[float]:
    page = read(metrics, status())
    return [
        page["edgert_contributions_total", (outcome,)]
        for outcome in ("on_time", "late", "lost", "recomputed")
    ]


def test_contributions_of_other_devices_are_counted_by_what_became_of_them() -> None:
    metrics = Metrics()
    assert outcomes(metrics) == [0, 0, 0, 0]  # there from the beginning
    metrics.finished("stop", usage(contributions=ContributionCounts(40.0, (2.5, 0.25), 1.0, 0.5, False)))
    metrics.finished("length", usage(contributions=ContributionCounts(2.0, (), 0.0, 8.0, True)))
    metrics.finished("stop", usage())  # computed alone
    assert outcomes(metrics) == [42, 2.75, 1, 8.5]


@pytest.mark.parametrize("generated", [0, 1])
def test_an_answer_without_a_second_token_has_no_time_between_tokens(generated: int) -> None:
    metrics = Metrics()
    metrics.finished("length", usage(generated))
    page = read(metrics, status())
    assert page["edgert_token_seconds_count", ()] == 0
    assert page["edgert_time_to_first_token_seconds_count", ()] == generated


def test_the_status_is_read_at_the_scrape() -> None:
    page = read(Metrics(), status())
    assert page["edgert_requests_running", ()] == 2
    assert page["edgert_requests_queued", ()] == 1
    assert page["edgert_temperature_celsius", ()] == 51.5
    assert page["edgert_ready", ()] == 1
    assert page["edgert_start_time_seconds", ()] == 1000.5
    assert page["edgert_model_weight_bytes", ("demo",)] == 6_400_000


def test_a_device_without_a_thermometer_has_no_temperature() -> None:
    page = read(Metrics(), status(temperature=None))
    assert ("edgert_temperature_celsius", ()) not in page


def test_names_cannot_break_the_page() -> None:
    hostile = 'a"b\\c\n{d="e"} 1'
    page = read(Metrics(), status(name=hostile))
    assert page["edgert_model_kv_bytes", (hostile,)] == 1_000_000


def test_two_daemons_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.tokens(4)
    assert read(second, status())["edgert_generated_tokens_total", ()] == 0
