"""A full disk, and a server that is told to stop: one line that says so, nothing lost, the same model at the end.

Real processes, and real disks: a small tmpfs in a mount namespace of its own, with ballast that can be thrown out.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fidelity import ALL, Case, make_job, write_random_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster, Role
from shared import state_files
from shared.job import Job, Rounds

NAME = "north"
ROUNDS = 3
DISK_BYTES = 2**23
WAIT_S = 120.0


class Disk:
    """A small disk at a folder, for processes `within` it alone."""

    def __init__(self, folder: Path, holder: int) -> None:
        self.seen_from_here = Path(f"/proc/{holder}/root{folder}")
        enter = ["nsenter", "--target", str(holder), "--user", "--mount", "--preserve-credentials", "--"]
        self.within = [*enter, "env", f"--chdir={Path.cwd()}"]
        self._ballast = self.seen_from_here / "ballast"

    def fill(self, free: int) -> None:
        self._ballast.write_bytes(bytes(DISK_BYTES - free))

    def make_room(self) -> None:
        self._ballast.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """Skips the test where nobody may mount one. Gone with its holder, whose input ends with this process."""
    folder.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={DISK_BYTES} disk '{folder}' && echo there && exec cat"
    words, pipe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount], subprocess.PIPE
    try:
        holder = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        pytest.skip(f"no mount namespaces here: unshare: {error.strerror}")
    assert holder.stdout is not None
    try:
        if not holder.stdout.readline():
            pytest.skip(f"no mount namespaces here: {holder.communicate()[1].strip()}")
        yield Disk(folder, holder.pid)
    finally:
        holder.communicate(timeout=WAIT_S)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(model)
    made = make_job(model, Case(ALL, 1))
    return made.model_copy(update={"rounds": Rounds(count=ROUNDS, local_steps=4, evaluate_every=ROUNDS)})


@pytest.fixture
def site(tmp_path: Path) -> local_run.Site:
    path = write_random_rows(tmp_path / "rows.jsonl", 12, 0)
    return local_run.Site(NAME, path, path)


class Run:
    """Broker, server and a client, each of which can be started again."""

    def __init__(self, cluster: Cluster, job: Job, site: local_run.Site, out: Path) -> None:
        self.cluster = cluster
        addresses = local_run.start_broker(cluster, out)
        self.words = {
            "server": local_run.server_words(out, addresses["servers"], 1),
            "client": local_run.client_words(out, job, site, addresses["clients"]),
        }

    def start(self, role: str, within: list[str] | None = None) -> Role:
        return self.cluster.start(role, NAME if role == "client" else role, self.words[role], within or [])

    @staticmethod
    def end(role: Role) -> tuple[int, dict[str, Any]]:
        """Exit code and last line of a role, whose listener has read all of it."""
        code = role.process.wait(WAIT_S)
        assert role.listener is not None
        role.listener.join(WAIT_S)
        return code, role.events[-1]


@contextmanager
def running(job: Job, site: local_run.Site, out: Path) -> Iterator[Run]:
    local_run.prepare(job, [site], out)
    with Cluster(out / "logs", local_run.THREADS) as cluster:
        yield Run(cluster, job, site, out)


def trained(state: Path, result: Path) -> dict[str, Tensor]:
    tensors, _ = state_files.load(state, ROUNDS)
    found: dict[str, Tensor] = load_file(result / "trained.safetensors")
    return found | {name: value for name, value in tensors.items() if name.startswith("trunk/")}


def calm(job: Job, site: local_run.Site, out: Path) -> dict[str, Tensor]:
    local_run.train_together(job, [site], out)
    return trained(out / "server-state", out / "results" / NAME)


@pytest.mark.parametrize("full", ["server", pytest.param("client", marks=pytest.mark.slow)])
def test_a_full_disk_ends_its_role_with_one_line_and_with_room_the_run_ends_the_same(
    full: str, job: Job, site: local_run.Site, tmp_path: Path
) -> None:
    expected = calm(job, site, tmp_path / "calm")
    out = tmp_path / "run"
    where = {"server": out / "server-state", "client": out / "results" / NAME}
    with small_disk(where[full]) as disk, running(job, site, out) as run:
        # Room for the beginning and two rounds' drafts, not for the third round's.
        checkpoint = size_of(tmp_path / "calm" / where[full].relative_to(out) / f"checkpoint-{ROUNDS}")
        disk.fill(2 * checkpoint)
        within = {full: disk.within}
        roles = {role: run.start(role, within.get(role)) for role in ("server", "client")}
        code, said = run.end(roles[full])
        assert (code, said["status"], said["error_code"]) == (4, "error", "checkpoint")
        assert str(where[full]) in said["message"]
        assert "No space left on device" in said["message"]
        assert "make room" in said["hint"]
        assert "Traceback" not in roles[full].log.read_text()
        for number in (kept := state_files.numbers(disk.seen_from_here)):
            state_files.load(disk.seen_from_here, number)
        assert kept
        assert kept[-1] < ROUNDS
        disk.make_room()
        roles[full] = run.start(full, disk.within)
        for role in roles.values():
            assert run.end(role)[0] == 0, role.last_words()
        places = {**where, full: disk.seen_from_here}
        ended = trained(places["server"], places["client"])
    assert ended.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ended[name], expected[name])] == []


def size_of(folder: Path) -> int:
    """In whole pages, as tmpfs counts."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


def test_a_server_that_is_told_to_stop_says_where_it_stands_and_goes_on_from_there(
    job: Job, site: local_run.Site, tmp_path: Path
) -> None:
    expected = calm(job, site, tmp_path / "calm")
    out = tmp_path / "run"
    with running(job, site, out) as run:
        server, client = run.start("server"), run.start("client")
        while not any(event.get("event") == "step" and event["round"] == 1 for event in client.events):
            run.cluster.check()
            assert [*run.cluster.events(WAIT_S)]
        server.process.terminate()
        code, said = run.end(server)
        assert (code, said["status"], said["data"]["finished"]) == (0, "ok", False)
        rounds, checkpoint = said["data"]["rounds"], Path(said["data"]["checkpoint"])
        assert rounds >= 1
        assert checkpoint == state_files.path_of(out / "server-state", rounds)
        assert state_files.numbers(out / "server-state")[-1] == rounds
        for role in (run.start("server"), client):
            assert run.end(role)[0] == 0, role.last_words()
    ended = trained(out / "server-state", out / "results" / NAME)
    assert [name for name in expected if not torch.equal(ended[name], expected[name])] == []
