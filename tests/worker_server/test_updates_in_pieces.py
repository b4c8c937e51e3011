"""The server's side of updates in part: what it takes, and what it makes of them, against plain PyTorch."""

import pytest
import torch
from torch import Tensor

from shared.error_feedback import compress
from shared.errors import Refused, TensorError
from shared.job import Data, Job, Wire, parse_job
from shared.payload.messages import Update as UpdateMessage
from shared.payload.tensors import encode
from shared.secure.records import Channel
from worker_server.aggregators.method import Update
from worker_server.intake import Intake
from worker_server.round_end import aggregate
from worker_server.sessions import Session
from worker_server.telling import tell

SHAPES = {"x": (2, 3), "y": (5,), "z": ()}
SESSION = Session(b"s" * 16, "anna", b"p" * 32, Channel(b"s" * 16, send_key=bytes(32), receive_key=bytes(32)), 0.0)


def intake(wire: Wire) -> Intake:
    job = Job(model_name_or_path="m", data=Data(max_length=10), wire=wire)
    return Intake(job=job, width=4, update_shapes=SHAPES)


def difference(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


def test_pieces_become_a_ticket_that_says_what_its_sender_holds() -> None:
    compressed = compress(difference(0), {}, 0.5, "int8")
    message = UpdateMessage(request=9, round=3, weight=5, pieces=compressed.pieces)
    ticket = intake(Wire(update="int8", update_density=0.5)).update(SESSION, message, compressed.frames)
    assert (ticket.client, ticket.request, ticket.weight, ticket.held) == ("anna", 9, 5, 3)
    assert all(torch.equal(ticket.payload[name], compressed.sent[name]) for name in SHAPES)


def test_pieces_and_tensors_are_not_taken_for_each_other() -> None:
    compressed = compress(difference(0), {}, 0.5, "float32")
    encoded = [encode(name, value, "float32") for name, value in difference(0).items()]
    pieces = UpdateMessage(request=9, round=0, weight=5, pieces=compressed.pieces)
    tensors = UpdateMessage(request=9, round=0, weight=5, tensors=tuple(info for info, _ in encoded))
    with pytest.raises(TensorError, match="are whole tensors in float32, not pieces"):
        intake(Wire()).update(SESSION, pieces, compressed.frames)
    with pytest.raises(TensorError, match="are differences in pieces"):
        intake(Wire(update_density=0.5)).update(SESSION, tensors, [frame for _, frame in encoded])
    heavy = pieces.model_copy(update={"weight": 10**6})
    with pytest.raises(Refused, match="a weight of"):
        intake(Wire(update_density=0.5)).update(SESSION, heavy, compressed.frames)


def top(v: Tensor, k: int) -> Tensor:
    at = v.abs().topk(k).indices
    return torch.zeros_like(v).index_copy(0, at, v[at])


def test_rounds_are_those_of_a_few_lines_of_pytorch() -> None:
    """Two clients, five rounds, a third of 12 values up and a quarter down, memories at all three."""
    job = parse_job({"model_name_or_path": "m", "wire": {"update_density": 0.34, "average_density": 0.25}}, "job")
    held, untold, unsent = difference(100), dict[str, Tensor](), [dict[str, Tensor](), dict[str, Tensor]()]
    w, e, memories = flat(held), torch.zeros(12).double(), [torch.zeros(12).double(), torch.zeros(12).double()]
    for round in range(5):
        changes = [difference(10 * round + client) for client in range(2)]
        updates = []
        for client, change in enumerate(changes):
            compressed = compress(change, unsent[client], 0.34, "float32")
            unsent[client] = compressed.unsent
            updates.append(Update(str(client), 1 + 2 * client, {}, changes=compressed.sent))
        result = aggregate(job, held, updates, {})
        told = tell(job.wire, held, dict(result.values), untold)
        held, untold = told.values, told.unsent

        mean = torch.zeros(12).double()
        for client, change in enumerate(changes):
            v = flat(change) + memories[client]
            memories[client] = v - top(v, 4)
            mean += top(v, 4) * (0.25 + 0.5 * client)
        u = mean + e
        w, e = w + top(u, 3), u - top(u, 3)
        torch.testing.assert_close(flat(held), w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(flat(untold), e, rtol=1e-5, atol=1e-6)


def test_an_update_too_long_is_bounded_whatever_way_it_came() -> None:
    job = parse_job({"model_name_or_path": "m", "aggregation": {"type": "fedavg", "max_update_norm": 0.5}}, "job")
    start, change = difference(1), difference(2)
    whole = Update("a", 1, {name: start[name].double() + change[name].double() for name in SHAPES})
    by_change = aggregate(job, start, [Update("a", 1, {}, changes=change)], {})
    by_values = aggregate(job, start, [whole], {})
    assert (by_change.bounded, by_values.bounded) == (1, 1)
    moved = flat(dict(by_change.values)) - flat(start)
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(flat(dict(by_change.values)), flat(dict(by_values.values)))
