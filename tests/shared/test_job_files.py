"""The job: one file, checked when read, the same digest however it is written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import JobError
from shared.job import FedAvg, Job, NoPrivacy, TrimmedMean, load_job, parse_job

JOB = {"model_name_or_path": "m", "rounds": {"count": 3, "local_steps": 4}, "method": {"type": "lora", "r": 4}}


def test_a_job_is_the_same_from_yaml_and_json(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    job = load_job(path)
    assert job == parse_job(dict(reversed(list(JOB.items()))), "x")
    assert job == parse_job(yaml.safe_load(job.canonical()), "x")
    assert job.total_steps == 12
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert load_job(path).digest() == job.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"split": {"head_blocks": 2}},
        {"method": {"type": "lora", "r": 5}},
        {"method": {"type": "full"}},
        {"training": {"seed": 1}},
        {"training": {"parts": ["trunk"]}},
        {"data": {"too_long": "skip"}},
        {"rounds": {"count": 3, "local_steps": 5}},
        {"cohort": {"deadline_s": 3}},
        {"aggregation": {"type": "fedadam"}},
        {"aggregation": {"type": "fedavg", "max_update_norm": 1}},
        {"wire": {"gradient": "bfloat16"}},
    ],
)
def test_the_digest_covers_every_setting(change: dict[str, Any]) -> None:
    assert parse_job(JOB | change, "x").digest() != parse_job(JOB, "x").digest()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainin": {}}, "unknown setting 'trainin'; did you mean 'training'?"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate"),
        ({"training": {"parts": []}}, "training.parts"),
        ({"training": {"parts": ["head", "head"]}}, "names a part twice"),
        ({"split": {"head_blocks": 0}}, "split.head_blocks"),
        ({"method": {"type": "magic"}}, "method"),
        ({"data": {"max_length": 2048}, "training": {"per_device_train_batch_size": 64}}, "cohort.max_batch_tokens"),
        ({"wire": {"hidden": "float64"}}, "wire.hidden"),
        ({"rounds": {"count": 2**31}}, "rounds.count"),
        ({"rounds": {"count": 16**5000}}, "rounds.count"),
        ({"a\nb\x1b[2J": 1}, r"unknown setting 'a\nb\x1b[2J'"),
    ],
)
def test_a_fault_is_one_line_that_names_the_setting(change: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as error:
        parse_job(JOB | change, "job.yaml")
    assert said in error.value.message
    assert "\n" not in error.value.message


SEPARATE = {"training": {"parts": ["head", "tail"]}}


@pytest.mark.parametrize(
    ("cohort", "said"),
    [
        ({"clients": 3, "sampled": 4}, "cohort.sampled=4 is larger than cohort.clients=3"),
        ({"clients": 5, "sampled": 2, "quorum": 3}, "cohort.quorum is larger than cohort.sampled"),
        ({"clients": 2, "quorum": 3}, "cohort.quorum is larger than cohort.clients"),
        ({"clients": 5, "deadline_mads": 4}, "needs a cohort.quorum of fewer than 5"),
        ({"clients": 5, "sampled": 3, "quorum": 3, "deadline_mads": 4}, "needs a cohort.quorum of fewer than 3"),
        ({"clients": 5, "quorum": 3, "deadline_mads": 4, "mode": "greedy"}, "it needs cohort.mode=lockstep"),
        ({"clients": 5, "quorum": 3, "deadline_mads": 0}, "cohort.deadline_mads"),
    ],
)
def test_rounds_that_could_not_be_are_refused_by_name(cohort: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as error:
        parse_job(JOB | {"cohort": cohort}, "job.yaml")
    assert said in error.value.message


def test_the_quorum_is_all_whom_a_round_takes_unless_it_is_named() -> None:
    quorums = [
        parse_job(JOB | {"cohort": cohort, "aggregation": {"secure": "off"}}, "job.yaml").cohort.effective_quorum
        for cohort in ({"clients": 5}, {"clients": 5, "sampled": 2}, {"clients": 5, "sampled": 3, "quorum": 1})
    ]
    assert quorums == [5, 2, 1]


def test_an_aggregation_without_a_type_is_fedavg() -> None:
    assert parse_job(JOB | {"aggregation": {"secure": "off"}}, "job.yaml").aggregation == FedAvg(secure="off")
    with pytest.raises(JobError, match=r"unknown setting 'aggregation\.fedavg\.momentum'"):
        parse_job(JOB | {"aggregation": {"momentum": 0.9}}, "job.yaml")


@pytest.mark.parametrize(
    ("aggregation", "change", "said"),
    [
        ({"type": "mean"}, {}, "aggregation"),
        ({"type": "fedavg", "momentum": 0.9}, {}, "unknown setting 'aggregation.fedavg.momentum'"),
        ({"type": "fedavgm", "momentum": 1}, {}, "momentum"),
        ({"type": "fedadam"}, {"training": {"parts": ["trunk"]}}, "has nothing to aggregate: add head or tail"),
        ({"type": "fedavg", "max_update_norm": 1}, {"training": {"parts": ["trunk"]}}, "has nothing to aggregate"),
        ({"type": "median"}, {"cohort": {"clients": 3}}, "set cohort.adapters=per_client, or leave trunk out"),
        ({"type": "median"}, {"cohort": {"clients": 2}, **SEPARATE}, "needs rounds of 3 clients at least"),
        ({"type": "trimmed_mean", "trim_ratio": 0.5}, {"cohort": {"clients": 9}, **SEPARATE}, "trim_ratio"),
        ({"type": "trimmed_mean", "trim_ratio": 0.1}, {"cohort": {"clients": 9}, **SEPARATE}, "takes 1/9 at least"),
        ({"type": "krum", "byzantine": 2}, {"cohort": {"clients": 6}, **SEPARATE}, "2 x byzantine + 3 = 7 clients"),
        (
            {"type": "scaffold", "max_update_norm": 1},
            {},
            "scaffold needs training.optim=sgd, training.lr_scheduler_type=constant, training.max_grad_norm=null, "
            "aggregation.max_update_norm=null",
        ),
        (
            {"type": "fedsgd", "proximal_mu": 0.1},
            {
                "cohort": {"mode": "greedy", "adapters": "per_client", "clients": 6, "replicas": 2},
                "rounds": {"weighting": "clients"},
                "wire": {"average": "int8"},
            },
            "aggregation.type=fedsgd needs rounds.local_steps=1, rounds.weighting=tokens, cohort.mode=lockstep, "
            "cohort.adapters=shared, cohort.replicas=1, aggregation.proximal_mu=0, wire.average=float32 and",
        ),
        ({"type": "fedavg", "proximal_mu": 0.1}, {"training": {"parts": ["trunk"]}}, "has nothing to aggregate"),
        (
            {"type": "fedavg", "personal": ["tail"]},
            {"training": {"parts": ["head"]}},
            "aggregation.personal names tail, which is not among training.parts",
        ),
        ({"type": "fedavg", "personal": ["head", "head"]}, {}, "aggregation.personal names a part twice"),
        ({"type": "fedavg", "personal": ["trunk"]}, {}, "aggregation.fedavg.personal"),
        ({"type": "fedadam", "personal": ["head", "tail"]}, {}, "take one out of aggregation.personal"),
        ({"type": "median"}, {"cohort": {"clients": 5, "sampled": 2}, **SEPARATE}, "needs rounds of 3 clients"),
        (
            {"type": "fedavg"},
            {"cohort": {"clients": 8, "sampled": 4, "replicas": 2}},
            "cohort.replicas=2 servers knows",
        ),
        (
            {"type": "multi_krum", "byzantine": 2},
            {"cohort": {"clients": 7, "quorum": 6}, **SEPARATE},
            "cohort.quorum is 6",
        ),
    ],
)
def test_an_aggregation_that_contradicts_the_job_is_refused_by_name(
    aggregation: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError) as error:
        parse_job(JOB | change | {"aggregation": aggregation}, "job.yaml")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("aggregation", "change"),
    [
        ({"type": "fedyogi", "max_update_norm": 2.5}, {}),
        ({"type": "median"}, {"cohort": {"clients": 3, "adapters": "per_client"}}),
        ({"type": "trimmed_mean", "trim_ratio": 0.3}, {"cohort": {"clients": 10}, **SEPARATE}),
        ({"type": "krum", "byzantine": 2}, {"cohort": {"clients": 7}, **SEPARATE}),
    ],
)
def test_aggregations_that_fit_are_taken(aggregation: dict[str, Any], change: dict[str, Any]) -> None:
    job = parse_job(JOB | change | {"aggregation": aggregation | {"secure": "off"}}, "job.yaml")
    assert parse_job(yaml.safe_load(job.canonical()), "x") == job
    assert job.aggregation.needs_single_updates


CENTRAL = {"type": "central", "clip_norm": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}
LOCAL = CENTRAL | {"type": "local"}
ALIKE = {"rounds": {"weighting": "clients"}}
PER_CLIENT = {"cohort": {"adapters": "per_client", "clients": 3}}
EVERYTHING = {"training": {"parts": ["head", "trunk", "tail"]}}


@pytest.mark.parametrize(
    ("privacy", "change", "said"),
    [
        (CENTRAL | {"noise_multiplier": 0}, {}, "privacy.central.noise_multiplier"),
        (CENTRAL | {"noise_multiplier": float("nan")}, {}, "privacy.central.noise_multiplier"),
        (CENTRAL | {"delta": 1}, {}, "privacy.central.delta"),
        (CENTRAL | {"delta": 0}, {}, "privacy.central.delta"),
        (LOCAL | {"clip_norm": 0}, {}, "privacy.local.clip_norm"),
        ({"type": "central"}, {}, "privacy.central.clip_norm"),
        ({"type": "none", "delta": 1e-5}, {}, "unknown setting 'privacy.none.delta'"),
        (CENTRAL | {"clip_nrom": 1.0}, {}, "did you mean 'clip_norm'"),
        (
            CENTRAL,
            {"rounds": {"weighting": "tokens"}},
            "privacy.type=central needs rounds.weighting=clients: by tokens",
        ),
        (LOCAL, {"rounds": {"weighting": "rows"}}, "privacy.type=local needs rounds.weighting=clients: by rows"),
        (CENTRAL, EVERYTHING, "a trunk that all train at once learns from raw gradients: leave trunk out"),
        (LOCAL, EVERYTHING, "split.trunk=client"),
        (CENTRAL, {"training": {"parts": ["trunk"]}}, "a trunk that all train at once"),
        (LOCAL, EVERYTHING | PER_CLIENT, "adapters that the server holds"),
        (CENTRAL, {"aggregation": {"type": "fedavg", "max_update_norm": 1}}, "needs aggregation.max_update_norm=null"),
        (
            CENTRAL,
            {"aggregation": {"type": "median", "secure": "off"}, "cohort": {"clients": 3}},
            "aggregation.type=median it may change",
        ),
        (
            CENTRAL,
            {"aggregation": {"type": "krum", "secure": "off"}, "cohort": {"clients": 5}},
            "privacy.type=local",
        ),
        (CENTRAL, EVERYTHING | PER_CLIENT, "aggregation.secure=secagg hides the one from the server"),
        (
            LOCAL | {"clip_norm": 200.0},
            {"cohort": {"clients": 3}},
            "aggregation.secure=secagg clips values to 1024: lower privacy.clip_norm",
        ),
        (LOCAL, {"aggregation": {"type": "fedavg", "lora": "exact"}}, "aggregation.lora=exact adds products"),
        (
            CENTRAL,
            {
                "aggregation": {"type": "scaffold"},
                "training": SEPARATE["training"]
                | {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": None},
            },
            "aggregation.type=scaffold reads mean gradients",
        ),
    ],
)
def test_privacy_that_could_not_be_kept_is_refused_by_name(
    privacy: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError) as error:
        parse_job({"model_name_or_path": "m"} | SEPARATE | ALIKE | change | {"privacy": privacy}, "job.yaml")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("privacy", "change"),
    [
        (CENTRAL, {}),
        (LOCAL, {}),
        (CENTRAL, EVERYTHING | PER_CLIENT | {"aggregation": {"type": "fedavg", "secure": "off"}}),
        (CENTRAL, {"training": {"parts": ["trunk"]}} | PER_CLIENT),
        (LOCAL, {"cohort": {"clients": 3}}),
        (LOCAL, EVERYTHING | {"split": {"trunk": "client"}}),
        (CENTRAL, EVERYTHING | {"split": {"trunk": "client"}}),
        (CENTRAL, {"aggregation": {"type": "fedadam", "lora": "freeze_a", "proximal_mu": 0.1}}),
        (LOCAL, {"aggregation": {"type": "median", "secure": "off"}, "cohort": {"clients": 3}}),
    ],
)
def test_privacy_that_fits_is_taken(privacy: dict[str, Any], change: dict[str, Any]) -> None:
    job = parse_job({"model_name_or_path": "m"} | SEPARATE | ALIKE | change | {"privacy": privacy}, "job.yaml")
    assert parse_job(yaml.safe_load(job.canonical()), "x") == job
    assert job.digest() != job.model_copy(update={"privacy": NoPrivacy()}).digest()


def test_trimming_counts_as_people_do() -> None:
    assert [TrimmedMean(trim_ratio=ratio).cut(n) for ratio, n in ((0.29, 100), (0.3, 10), (0.2, 14))] == [29, 3, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a\n", "mapping"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe", "not YAML"),
        (b"", "mapping"),
        (b'name: !!int ""', "has no tags"),
        (b"name: !!bool perhaps", "has no tags"),
        (b'name: "\\UFFFFFFFF"', "not YAML"),
        (b"name: 1" + b":00" * 250 + b".0", "not YAML"),
        (b"name: " + b"[" * 60_000, "nested too deeply"),
        (b"name: " + b"{a: " * 21, "nested too deeply"),
        (b"- " * 30_000, "nested too deeply"),
        (b"a: &a {b: c}\nd: {<<: [" + b"*a, " * 11 + b"]}", "more than 10 aliases"),
    ],
)
def test_a_file_that_is_no_job_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(JobError, match=said):
        load_job(path)


def test_a_few_aliases_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model_name_or_path: m\nrounds: &few {count: 2, local_steps: &n 3}\ncohort: {clients: *n}\n")
    assert load_job(path).cohort.clients == 3


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"none\.yaml: No such file"):
        load_job(tmp_path / "none.yaml")


def test_settings_cannot_be_changed_after_the_fact() -> None:
    job = Job(model_name_or_path="m")
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"
