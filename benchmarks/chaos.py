"""Kill -9 of any role at random moments, again and again: the run ends with the same model as an undisturbed one.

A broker, a server and three clients as processes, links with keys, a small random Llama, everything trained, fp32, in
lockstep. First a run that nobody disturbs, then the same under a supervisor while for `--seconds` somebody picks a role
and kills it, with pauses drawn from an exponential distribution.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fidelity import ALL, Case, make_job, write_random_rows
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster
from launcher.supervisor import Supervisor
from shared import state_files
from shared.errors import DeadlineExceeded
from shared.job import Job, Rounds

NAMES = ("north", "valley", "coast")
ROLES = ("broker", "server", *NAMES)
PAUSE_S = 7.0
LIMIT_S = 600.0
LOCAL_STEPS = 25


def sites(folder: Path) -> list[local_run.Site]:
    paths = {name: write_random_rows(folder / f"{name}.jsonl", 12, seed) for seed, name in enumerate(NAMES)}
    return [local_run.Site(name, path, path) for name, path in paths.items()]


def trained(out: Path) -> dict[str, Tensor]:
    """All that a run trained, at the server and at the clients."""
    state = out / "server-state"
    tensors, _ = state_files.load(state, state_files.numbers(state)[-1])
    found = {name: value for name, value in tensors.items() if name.startswith("trunk/")}
    for name in NAMES:
        parts = load_file(out / "results" / name / "trained.safetensors")
        found |= {f"{name}/{key}": value for key, value in parts.items()}
    return found


class Watcher:
    """Completed rounds at the server: they may only grow."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.completed = 0
        self.lost = 0

    def look(self) -> None:
        newest = max(state_files.numbers(self.state), default=0)
        self.lost += max(0, self.completed - newest)
        self.completed = newest


def commands(job: Job, rows: list[local_run.Site], out: Path) -> dict[str, list[str]]:
    """The words of each role, on addresses that stay when it is started again; what they need lies under `out`."""
    local_run.prepare(job, rows, out)
    clients, servers = (f"tcp://127.0.0.1:{local_run.free_port()}" for _ in range(2))
    words = {"broker": local_run.broker_words(out, clients, servers)}
    words["server"] = local_run.server_words(out, servers, 1)
    return words | {site.name: local_run.client_words(out, job, site, clients) for site in rows}


def disturbed(job: Job, rows: list[local_run.Site], out: Path, seconds: float, seed: int) -> tuple[Counter[str], int]:
    """Kills by role, and rounds that were completed and then gone."""
    words = commands(job, rows, out)
    chance, kills = random.Random(seed), Counter[str]()
    began = time.monotonic()
    next_kill = began + chance.expovariate(1 / PAUSE_S)
    watcher = Watcher(out / "server-state")
    with Cluster(out / "logs", local_run.THREADS) as cluster:
        supervisor = Supervisor(cluster, words, lambda line: print(line, file=sys.stderr))
        while not supervisor.done:
            for _ in cluster.events(0.1):
                pass
            supervisor.turn()
            watcher.look()
            now = time.monotonic()
            if next_kill <= now < began + seconds:
                role = chance.choice(ROLES)
                kills[role] += supervisor.kill(role)
                next_kill = now + chance.expovariate(1 / PAUSE_S)
            if now - began > LIMIT_S:
                raise DeadlineExceeded(f"not done after {LIMIT_S:g} s")
    return kills, watcher.lost


def main() -> None:
    arguments = parser("chaos", __doc__)
    arguments.add_argument("--seconds", type=float, default=120.0, help="how long there are kills")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    if given.quick:
        given.seconds = min(given.seconds, 20.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model("llama", folder / "model")
        save_word_tokenizer(model)
        rounds = max(4, int(given.seconds / 2))
        job = make_job(model, Case(ALL, len(NAMES)))
        job = job.model_copy(update={"rounds": Rounds(count=rounds, local_steps=LOCAL_STEPS, evaluate_every=rounds)})
        rows = sites(folder)
        calm = local_run.train_together(job, rows, folder / "calm")
        began = time.monotonic()
        kills, lost = disturbed(job, rows, folder / "chaos", given.seconds, given.seed)
        seconds = time.monotonic() - began
        one, other = trained(folder / "calm"), trained(folder / "chaos")
    assert one.keys() == other.keys()
    differences = {key: float((one[key] - other[key]).abs().max()) for key in one}
    difference = max(differences.values())
    figures = {
        "kills": sum(kills.values()),
        "kills_by_role": dict(kills),
        "work_lost": lost,
        "max_adapter_difference": difference,
        "unequal": sorted(key for key, value in differences.items() if value > 0),
        "rounds": rounds,
        "seconds": seconds,
        "seconds_undisturbed": calm.seconds,
    }
    table = [[role, str(kills[role])] for role in ROLES]
    goals = [Goal("work_lost", lost, 0, at_most=True), Goal("max_adapter_difference", difference, 0, at_most=True)]
    publish("chaos", ["role", "kills"], table, figures, goals, as_json=given.json)


if __name__ == "__main__":
    main()
