"""What a load test computes from what it saw; without processes."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loadtest.batches import make_batches
from loadtest.counts import Counts
from loadtest.crowd import kinds
from loadtest.durations import SHORTEST_S, WIDTH, Durations
from loadtest.measure import Sample
from loadtest.plan import Plan
from loadtest.report import describe_in_words, write_report
from loadtest.summary import summarise
from loadtest.view import table


@given(st.lists(st.floats(SHORTEST_S, 1000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_percentiles_are_right_to_a_bucket(values: list[float], share: float) -> None:
    durations = Durations()
    for value in values:
        durations.add(value)
    found = durations.percentile(share)
    assert found is not None
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    assert exact / WIDTH**1.01 <= found <= exact * WIDTH**1.01


def test_durations_add_up_in_bounded_memory_and_travel_as_json() -> None:
    chance, counts = random.Random(0), Counts()
    for _ in range(50_000):
        counts.latencies["forward"].add(chance.expovariate(10))
    assert len(counts.latencies["forward"].buckets) < 1000
    counts.sums["requests"] += 3
    counts.errors["no_answer"] += 1
    again = Counts.from_json(counts.to_json())
    again.add(counts)
    assert again.sums == {"requests": 6}
    assert again.errors == {"no_answer": 2}
    assert again.latencies["forward"].count == 100_000
    assert counts.take().sums == {"requests": 3}
    assert counts.sums == {}


def test_nothing_measured_has_no_percentiles() -> None:
    assert Durations().summary() == {"count": 0, "p50": None, "p95": None, "p99": None, "max": None}


def test_every_client_has_its_behaviour() -> None:
    plan = Plan(clients=200, malicious=0.05, slow=0.1, churning=0.5)
    counted = Counter(kinds(plan))
    assert counted == {"malicious": 10, "slow": 19, "churning": 86, "steady": 85}
    assert plan.trainers == counted["churning"] + counted["steady"]
    assert kinds(plan) == kinds(plan)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"shortest": 9, "longest": 8}, "shortest"),
        ({"malicious": 1.0}, "somebody has to train"),
        ({"clients": 1, "slow": 1.0}, "somebody has to train"),
        ({"churning": 0.6, "slow": 0.5}, "more than everybody"),
        ({"clients": 2, "processes": 3}, "processes"),
        ({"seconds": float("inf")}, "seconds"),
        ({"ramp_s": -1}, "ramp_s"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Plan.model_validate(settings)


def test_batches_have_the_lengths_that_the_plan_says() -> None:
    batches = make_batches(Plan(rows=3, shortest=5, longest=20, hidden_size=16))
    lengths = [length for batch in batches for length in batch.lengths]
    assert min(lengths) >= 5
    assert max(lengths) <= 20
    assert len(set(lengths)) > 5
    for batch in batches:
        for info, frame in (batch.hidden, batch.gradient):
            assert info.shape == (batch.tokens, 16)
            assert memoryview(frame).nbytes == 4 * batch.tokens * 16


def sample(at: float, *, measured: bool) -> Sample:
    counts = Counts()
    counts.sums.update({"requests": 20, "steps": 8, "tokens": 300, "bytes_up": 10**6, "bytes_down": 10**6})
    for milliseconds in range(1, 11):
        counts.latencies["forward"].add(milliseconds / 1000)
    broker = {"process_resident_memory_bytes": 10**6 * at, "process_cpu_seconds_total": at / 4}
    server = broker | {
        "process_cpu_seconds_total": at / 2,
        "flglm_server_queue_requests": 3.0,
        "flglm_server_wait_seconds_sum": 2.0,
        "flglm_server_wait_seconds_count": 8.0,
        "flglm_server_cohort_requests_sum": 12.0,
        "flglm_server_cohort_requests_count": 5.0,
        'flglm_server_cohort_requests_bucket{le="1.0"}': 3.0,
        'flglm_server_cohort_requests_bucket{le="4.0"}': 5.0,
        'flglm_server_cohort_requests_bucket{le="+Inf"}': 5.0,
        'flglm_server_refusals_total{code="seal"}': 7.0,
    }
    crowd = {"memory_bytes": 2e6, "cpu_s": at / 8}
    return Sample(at, measured, 2.0, counts, 9, Counter(training=7, waiting=2), broker, server, crowd)


def test_rates_are_those_of_the_measured_time(tmp_path: Path) -> None:
    samples = [sample(2.0, measured=False), sample(4.0, measured=True), sample(6.0, measured=True)]
    samples[0].counts.errors["closed_silent"] += 1
    summary = summarise(Plan(clients=10), samples)
    assert summary["clients"] == 9
    assert summary["clients_asked_for"] == 10
    assert summary["errors"] == 1
    assert summary["errors_by_code"] == {"closed_silent": 1}
    assert summary["seconds"] == 4
    assert summary["throughput"] == {
        "requests_per_s": 10,
        "steps_per_s": 4,
        "tokens_per_s": 150,
        "mb_per_s": 1,
    }
    assert summary["latencies"]["forward"]["count"] == 20
    assert summary["latencies"]["forward"]["p50"] == pytest.approx(0.005, rel=0.021)
    assert summary["latencies"]["backward"]["p50"] is None
    assert summary["cohorts"] == {"count": 5, "mean_requests": 2.4, "sizes": {"1": 3, "4": 2, "more": 0}}
    assert summary["queue"] == {"mean": 3, "max": 3}
    assert summary["wait_s_mean"] == 0.25
    assert summary["memory_mb"]["broker"] == {"empty": 2, "start": 4, "end": 6, "peak": 6}
    assert summary["cpu_cores"] == {"broker": 0.25, "server": 0.5, "crowd": 0.125}
    assert summary["busiest"] == "server"
    assert summary["refusals"] == {"broker": {}, "server": {"seal": 7}}
    assert "1 errors (1 closed_silent)" in describe_in_words(summary, None)
    write_report(summary, samples, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "<script" not in page
    assert "$" not in page
    assert table(Plan(clients=10), samples[-1]).row_count > 5


def test_time_goes_on_in_a_report(tmp_path: Path) -> None:
    samples = [sample(at, measured=at > 2) for at in (1.0, 2.0, 3.0)]
    assert all(earlier.at < later.at for earlier, later in pairwise(samples))
    only_ramp = summarise(Plan(), samples[:1])
    assert only_ramp["seconds"] == 2
