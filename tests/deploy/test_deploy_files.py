"""What lies in deploy/ and in the guide: it parses, every `flglm` command in it is a real one, and facts agree."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client import Metric

from benchmarks.fidelity import Case, make_job
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import serving
from launcher.main import app
from shared.errors import Refused, UsageError
from shared.job import Cohort
from worker_server.service import STOP_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
GPU = DEPLOY / "compose.gpu.yaml"
GUIDES = (ROOT / "docs" / "several-machines.md", ROOT / "README.md")
UNITS = sorted((DEPLOY / "systemd").iterdir())
ROLES = ("broker", "server", "client")
BINARY = "/opt/flglm/bin/flglm"
CLIENT = ["client", "train", "--invite=i", "--key=k", "--data=d", "--out=o"]
# The series of a histogram end in these.
SERIES = ("_bucket", "_sum", "_count")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(DEPLOY / "alerts.yml")["groups"] for rule in group["rules"]]


def accept(words: list[str]) -> None:
    """Parse the words as the command line would, and run nothing. Raises what the command line would raise."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    path = ["flglm"]
    while getattr(command, "commands", None) is not None:
        path.append(words.pop(0))
        assert path[-1] in command.commands, f"{' '.join(path)} is no command"
        command = command.commands[path[-1]]
    command.make_context(" ".join(path), words)


def with_defaults(word: str, chosen: Mapping[str, str]) -> str:
    """With `${NAME}` and `${NAME:-default}` filled in where they are chosen or have a default."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: chosen.get(found[1], found[2] or found[0]), word)


def unit_defaults(unit: Path) -> dict[str, str]:
    """The variables that a unit sets itself; its EnvironmentFile may say otherwise."""
    lines = re.findall(r"^Environment=(.*)$", unit.read_text(), re.M)
    return dict(word.split("=", 1) for line in lines for word in line.split())


def unit_words(unit: Path) -> list[str]:
    """What a unit starts, as words, without the variable that stands for more options."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.M)
    words = [word for word in shlex.split(line) if word != "$FLGLM_OPTIONS"]
    assert words.pop(0) == BINARY
    return words


def guide_lines(guide: Path) -> Iterator[str]:
    """Commands in indented or fenced blocks, continued lines joined."""
    text = guide.read_text().replace("\\\n", " ")
    for block in re.findall(r"```.*?```", text, re.S):
        yield from block.splitlines()
    for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
        if line.startswith("    "):
            yield line.strip()


def guide_commands(guide: Path) -> list[list[str]]:
    found = []
    for line in guide_lines(guide):
        words = shlex.split(line, comments=True) if "flglm" in line else []
        if words and Path(words[0]).name == "flglm" and "…" not in words:
            found.append(words[1:])
    return found


# Commands


def test_a_wrong_command_is_noticed() -> None:
    accept(["keys", "new", "broker"])
    for words in (["keys", "renew", "x"], ["broker", "--keys", "k"], ["client", "train"], ["keys", "new", "a", "b"]):
        with pytest.raises((AssertionError, typer.BadParameter.__bases__[0])):
            accept(words)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_commands_of_the_guides_exist(guide: Path) -> None:
    commands = guide_commands(guide)
    assert len(commands) >= 8
    for words in commands:
        accept(words)


@pytest.mark.parametrize("role", ROLES)
def test_commands_of_the_containers_exist(role: str) -> None:
    accept(load(COMPOSE)["services"][role]["command"])


def test_the_gpu_changes_the_device_alone() -> None:
    plain, gpu = load(COMPOSE)["services"]["server"]["command"], load(GPU)["services"]["server"]["command"]
    accept(gpu)
    assert [(a, b) for a, b in zip(plain, gpu, strict=True) if a != b] == [("--device=cpu", "--device=cuda")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_commands_of_the_units_exist(unit: Path) -> None:
    accept(unit_words(unit))


def test_a_broker_promises_no_line_a_step() -> None:
    """It knows of no steps."""
    for words in (["broker"], ["server", "--job=j", "--key=k"], CLIENT):
        accept(words)
    accept(["server", "--job=j", "--key=k", "-v"])
    accept([*CLIENT, "-v"])
    with pytest.raises(typer.BadParameter.__bases__[0], match="-v"):
        accept(["broker", "-v"])


# Facts that stand in two places


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_started_again_unless_it_is_no_use(unit: Path) -> None:
    text = unit.read_text()
    settings = dict(re.findall(r"^([A-Za-z]+)=(.*)$", text, re.M))
    assert settings["Restart"] == "on-failure"
    assert {int(code) for code in settings["RestartPreventExitStatus"].split()} == {
        Refused.exit_code, UsageError.exit_code,
    }  # fmt: skip
    assert settings["KillSignal"] == "SIGTERM"
    assert settings["NoNewPrivileges"] == "yes"
    assert settings["ProtectSystem"] == "strict"
    assert settings["User"] == unit.name.split(".")[0].rstrip("@")
    states = [f"/var/lib/{folder}" for folder in settings.get("StateDirectory", "").split()]
    words = [with_defaults(word, unit_defaults(unit)) for word in unit_words(unit)]
    for word in words:
        assert not word.startswith("/var/lib/") or any(f"{word}/".startswith(f"{folder}/") for folder in states), word


def test_two_instances_on_the_same_rows_pay_from_one_ledger() -> None:
    """The unit of systemd, for two jobs: results apart, what was spent together."""
    unit = DEPLOY / "systemd" / "flglm-client@.service"
    words = [with_defaults(word, unit_defaults(unit)) for word in unit_words(unit)]
    first, second = ([word.replace("%i", name) for word in words] for name in ("hospital-a", "hospital-a-2"))
    options = {words[at]: (first[at + 1], second[at + 1]) for at in range(len(words)) if words[at].startswith("--")}
    assert len(set(options["--out"])) == 2
    assert options["--privacy-ledger"] == ("/var/lib/flglm-ledgers",) * 2
    chosen = [with_defaults(word, {"FLGLM_LEDGER": "/var/lib/flglm-ledgers/x.json"}) for word in unit_words(unit)]
    assert chosen[chosen.index("--privacy-ledger") + 1] == "/var/lib/flglm-ledgers/x.json"


def test_a_second_job_in_a_container_pays_from_the_same_ledger() -> None:
    """Its result lies beside the first's, in a volume that is the same for every project."""
    document = load(COMPOSE)
    command = document["services"]["client"]["command"]
    first, second = (
        dict(with_defaults(word, chosen).split("=", 1) for word in command if "=" in word)
        for chosen in ({}, {"FLGLM_RESULT": "job-2"})
    )
    assert {key for key in first if first[key] != second[key]} == {"--out"}
    (volume,) = [entry for entry in document["services"]["client"]["volumes"] if entry["type"] == "volume"]
    for options in (first, second):
        assert options["--out"].startswith(f"{volume['target']}/")
        assert options["--privacy-ledger"].startswith(f"{volume['target']}/")
        assert not options["--privacy-ledger"].startswith(options["--out"])
    # As it was named before it had a name, so that nobody's is left behind.
    assert document["volumes"][volume["source"]] == {"name": f"{document['name']}_{volume['source']}"}
    guide = GUIDES[0].read_text()
    assert {"FLGLM_RESULT", "FLGLM_LEDGER"} <= set(re.findall(r"FLGLM_[A-Z]+", guide))


def test_nobody_kills_a_server_that_still_computes() -> None:
    service = load(COMPOSE)["services"]["server"]
    assert int(service["stop_grace_period"].removesuffix("s")) > STOP_S
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", (DEPLOY / "systemd/flglm-server.service").read_text(), re.M)
    assert int(seconds) > STOP_S


@pytest.mark.parametrize("name", [*ROLES, "prometheus"])
def test_containers_can_write_to_their_volumes_alone(name: str) -> None:
    document = load(COMPOSE)
    service = document["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for volume in service["volumes"]:
        assert volume["type"] == "volume" or volume["read_only"] is True
        assert volume["type"] == "bind" or volume["source"] in document["volumes"]
    for kind in ("secrets", "configs"):
        names = [entry if isinstance(entry, str) else entry["source"] for entry in service.get(kind, [])]
        assert set(names) <= document[kind].keys()
    mounted = {entry["target"] for entry in [*service["volumes"], *service.get("configs", [])]}
    mounted |= {f"/run/secrets/{name}" for name in service.get("secrets", [])}
    for word in service["command"]:
        path = with_defaults(word.partition("=")[2], {})
        assert not path.startswith("/") or any(path == to or path.startswith(f"{to}/") for to in mounted), word


@pytest.mark.parametrize("role", ["broker", "server"])
def test_health_is_asked_where_metrics_are_served(role: str) -> None:
    service = load(COMPOSE)["services"][role]
    (address,) = [word.partition("=")[2] for word in service["command"] if word.startswith("--metrics-address=")]
    port = address.rpartition(":")[2]
    assert f"127.0.0.1:{port}/ready" in service["healthcheck"]["test"][-1]
    (targets,) = [
        job["static_configs"][0]["targets"]
        for job in load(DEPLOY / "prometheus.yml")["scrape_configs"]
        if job["job_name"] == f"flglm-{role}"
    ]
    assert targets == [f"{role}:{port}"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """What a running broker and server really serve."""
    folder = tmp_path_factory.mktemp("metrics")
    job = make_job(save_tiny_model("llama", folder / "model"), Case(("trunk",), 1))
    with serving(job, folder, ["a"]) as running, running.link("a"):
        registries = (running.broker.registry, running.running.registry)
        return [family for registry in registries for family in registry.collect()]


def test_alerts_and_guide_name_metrics_that_exist(served: list[Metric]) -> None:
    metrics = {family.name + ("_total" if family.type == "counter" else "") for family in served}
    texts = [rule["expr"] for rule in rules()] + [GUIDES[0].read_text()]
    named = {name for text in texts for name in re.findall(r"flglm_(?:broker|server)_[a-z_]+", text)}
    for ending in SERIES:
        named = {name.removesuffix(ending) for name in named}
    assert named
    assert named <= metrics


def test_alerts_and_guide_choose_by_purposes_that_exist(served: list[Metric]) -> None:
    (cohorts,) = [family for family in served if family.name == "flglm_server_cohorts"]
    texts = [rule["expr"] for rule in rules()] + [GUIDES[0].read_text()]
    chosen = [choice for text in texts for choice in re.findall(r"flglm_server_cohorts_total(\{[^}]*\})?", text)]
    exist = [f'{{purpose="{sample.labels["purpose"]}"}}' for sample in cohorts.samples]
    assert len(chosen) >= 3
    assert set(chosen) <= set(exist)


def test_what_wakes_somebody_is_true_of_every_kind_of_job() -> None:
    """In plain FedAvg there are no cohorts: what pages on them must look at rounds too."""
    pages = [rule["expr"] for rule in rules() if rule["labels"]["severity"] == "page"]
    assert any("flglm_server_round" in expr for expr in pages)
    assert all("flglm_server_round" in expr for expr in pages if "cohort" in expr)


def test_alerts_say_what_to_do_with_settings_and_codes_that_exist() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    for rule in rules():
        assert rule["annotations"].keys() == {"summary", "action"}
        assert set(re.findall(r"cohort\.([a-z_]+)", rule["annotations"]["action"])) <= Cohort.model_fields.keys()
        for codes in re.findall(r'code=~?"([^"]+)"', rule["expr"]):
            assert all(f"`{code}`" in protocol for code in codes.split("|")), codes


def test_the_image_holds_every_package() -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", (DEPLOY / "Dockerfile").read_text(), re.M))
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"}
    assert copied == packages
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in packages} <= set(allowed)


# Tools, where they are


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """For promtool: a server's samples, one a minute."""
    chosen = ",".join(f'{key}="{value}"' for key, value in {"job": "flglm-server", "instance": "gpu", **labels}.items())
    return {"series": f"flglm_server_{name}{{{chosen}}}", "values": values}


# Four hours of a job: open sessions, completed rounds, rounds left, trained cohorts; whether somebody wakes.
JOBS = {
    "plain FedAvg that gets on": ("2x240", "0x50 1x50 2x50 3x50 4x50", "5x240", "0x240", False),
    "plain FedAvg that waits": ("2x240", "1x240", "5x240", "0x240", True),
    "long rounds of a trunk that trains": ("2x240", "1x240", "5x240", "0+5x240", False),
    "a trunk that waits for a member": ("2x240", "1x240", "5x240", "70x240", True),
    "nobody there": ("0x240", "1x240", "5x240", "70x240", False),
    "a job that is done, and answers": ("2x240", "10x240", "0x240", "70x240", False),
}


@pytest.mark.parametrize("name", JOBS)
def test_no_progress_wakes_somebody_in_every_kind_of_job(name: str, tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not on this machine")
    sessions, rounds, left, trained, wakes = JOBS[name]
    (rule,) = [rule for rule in rules() if rule["alert"] == "FlglmNoProgress"]
    expected = {
        "exp_labels": {"job": "flglm-server", "instance": "gpu", **rule["labels"]},
        "exp_annotations": rule["annotations"],
    }
    case = {
        "interval": "1m",
        "input_series": [
            series("sessions", sessions),
            series("round", rounds),
            series("rounds_left", left),
            series("cohorts_total", trained, purpose="train"),
            series("cohorts_total", "0+1x240", purpose="evaluate"),
        ],
        "alert_rule_test": [
            {"eval_time": "30m", "alertname": rule["alert"], "exp_alerts": []},
            {"eval_time": "230m", "alertname": rule["alert"], "exp_alerts": [expected] if wakes else []},
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": [case]}))
    checked = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "test.yml")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(BINARY, shutil.which("true") or "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("files", [[COMPOSE], [COMPOSE, GPU]], ids=["plain", "gpu"])
def test_compose_takes_its_files(files: list[Path]) -> None:
    if shutil.which("docker") is None or subprocess.run(
        ["docker", "compose", "version"], capture_output=True, timeout=30, check=False
    ).returncode:  # fmt: skip
        pytest.skip("docker compose is not on this machine")
    words = [word for path in files for word in ("-f", str(path))]
    checked = subprocess.run(
        ["docker", "compose", *words, "--profile", "*", "config", "--quiet"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
