"""What cannot go together with sparse and quantised updates is refused by name."""

from typing import Any

import pytest
import yaml

from shared.errors import JobError
from shared.job import Job, Wire, parse_job

JOB: dict[str, Any] = {"model_name_or_path": "m"}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": None}
ROBUST = {"cohort": {"clients": 7}, "training": {"parts": ["head", "tail"]}}


@pytest.mark.parametrize(
    ("wire", "change", "said"),
    [
        ({"update": "int2"}, {}, "wire.update"),
        ({"update_density": 0}, {}, "wire.update_density"),
        ({"average_density": 1.5}, {}, "wire.average_density"),
        ({"density": 0.5}, {}, "unknown setting 'wire.density'"),
        (
            {"update": "int8"},
            {"training": {"parts": ["trunk"]}},
            "wire.update=int8, wire.update_density=1 have nothing",
        ),
        ({"average_density": 0.5}, {"training": {"parts": ["trunk"]}}, "wire.average_density=0.5 have nothing"),
        (
            {"update_density": 0.1},
            {"aggregation": {"type": "scaffold"}, "training": SGD},
            "wire.update_density=0.1 contradict aggregation.type=scaffold",
        ),
        (
            {"average": "int8"},
            {"aggregation": {"type": "scaffold"}, "training": SGD},
            "wire.average_density=1 contradict aggregation.type=scaffold",
        ),
        (
            {"update": "bfloat16"},
            {"aggregation": {"type": "fedavg", "lora": "exact"}},
            "contradict aggregation.lora=exact",
        ),
        (
            {"average": "int4"},
            {"aggregation": {"type": "fedavg", "lora": "exact"}},
            "contradict aggregation.lora=exact",
        ),
        (
            {"update_density": 0.25},
            ROBUST | {"aggregation": {"type": "median", "secure": "off"}},
            "wire.update_density=0.25 contradicts aggregation.type=median",
        ),
        (
            {"update_density": 0.25},
            ROBUST | {"aggregation": {"type": "multi_krum", "secure": "off"}},
            "wire.update_density=0.25 contradicts aggregation.type=multi_krum",
        ),
        (
            {"update_density": 0.25},
            {"cohort": {"clients": 3}},
            "wire.update_density=0.25 send part of an update, which aggregation.secure=secagg cannot mask",
        ),
        (
            {"update": "int8"},
            {
                "privacy": {"type": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5},
                "rounds": {"weighting": "clients"},
                "training": {"parts": ["head", "tail"]},
            },
            "privacy.type=central clips a round's update, and wire.update=int8",
        ),
    ],
)
def test_a_contradiction_is_refused_by_name(wire: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as error:
        parse_job(JOB | change | {"wire": wire}, "job.yaml")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("wire", "change"),
    [
        ({"update": "int8", "average_density": 0.1}, ROBUST | {"aggregation": {"type": "median", "secure": "off"}}),
        ({"update_density": 0.01, "update": "int4"}, {"aggregation": {"type": "fedadam", "max_update_norm": 1}}),
        ({"average_density": 0.25}, {"split": {"trunk": "client"}}),
        ({"average_density": 0.25}, {"cohort": {"clients": 3}}),
        ({"update_density": 0.5}, {"aggregation": {"type": "fedavg", "lora": "freeze_a"}}),
    ],
)
def test_what_fits_is_taken(wire: dict[str, Any], change: dict[str, Any]) -> None:
    job = parse_job(JOB | change | {"wire": wire}, "job.yaml")
    assert parse_job(yaml.safe_load(job.canonical()), "x") == job


def test_by_default_whole_values_travel() -> None:
    job = Job(model_name_or_path="m")
    assert not job.wire.compresses_updates
    assert not job.wire.compresses_averages
    assert Wire(update="int8").compresses_updates
    assert not Wire(update="int8").compresses_averages
    assert Wire(average_density=0.5).compresses_averages
