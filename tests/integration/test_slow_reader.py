"""A client that asks and asks and reads no answer: it loses its session, and nobody else notices."""

from pathlib import Path

import torch

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.fuzz import Attacker, resident_mb
from benchmarks.tiny_models import save_tiny_model
from broker.settings import BrokerSettings
from launcher.in_process import SERVERS, Background, Site, serving, train_in_process, train_one, trunk_tensors
from shared.job import Rounds
from shared.payload.messages import Generate, pack
from shared.payload.tensors import encode

QUEUE = 8
MORE = 5000
# What a queue without a bound would hold of answers to so many requests is more.
GROWTH_MB = 16.0


def test_who_reads_nothing_loses_its_session_and_disturbs_nobody(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 1))
    job = job.model_copy(update={"rounds": Rounds(count=2, local_steps=3)})
    site = Site(random_rows(8, 0))
    train_in_process(job, {"honest": site}, tmp_path / "calm")
    settings = BrokerSettings(
        frontend="tcp://127.0.0.1:*", backend=SERVERS, high_water_mark=QUEUE, max_unanswered=10**6
    )
    with serving(job, tmp_path / "run", ["honest", "hostile"], broker_settings=settings) as running:
        deaf, service = Attacker(running, seed=0), running.running.service
        assert service is not None
        info, frame = encode("hidden", torch.zeros(3, 32), "float32")
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += 1
            request = Generate(request=asked, stream=1, lengths=(3,), tensors=(info,))
            deaf.connection.socket.send_multipart(deaf.malice.channel.seal(pack(request, [frame])).frames())

        while deaf.session in service.sessions:
            ask()
        assert running.broker.router.counters["refused_peer_too_slow"] == 1
        before = resident_mb()
        honest = Background("honest", lambda: train_one(running, "honest", site, tmp_path / "run"))
        for _ in range(MORE):
            ask()
        honest.join()
        assert resident_mb() - before < GROWTH_MB
        deaf.connection.socket.close(0)
    calm, run = trunk_tensors(tmp_path / "calm"), trunk_tensors(tmp_path / "run")
    assert [name for name in calm if not torch.equal(calm[name], run[name])] == []
