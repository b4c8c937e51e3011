"""What a message must be before it becomes a ticket: sizes, dtypes, values and budgets, each with its refusal."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import Refused, TensorError
from shared.job import Cohort, Data, Job, Rounds, Training, Wire, WireFormat
from shared.payload.messages import Backward, Forward, Join, Update
from shared.payload.tensors import encode
from shared.secure.records import Channel
from worker_server.intake import Intake
from worker_server.kept import Rows
from worker_server.sessions import Session

WIDTH = 4
SESSION = Session(b"s" * 16, "anna", b"p" * 32, Channel(b"s" * 16, send_key=bytes(32), receive_key=bytes(32)), 0.0)


def intake(**wire: Any) -> Intake:
    job = Job(
        model_name_or_path="m",
        data=Data(max_length=10),
        training=Training(per_device_train_batch_size=1),
        cohort=Cohort(max_batch_tokens=16),
        wire=Wire(**wire),
    )
    return Intake(job=job, width=WIDTH, update_shapes={"x": (2, 2), "y": (3,)})


def forward(
    lengths: tuple[int, ...], hidden: Tensor, targets: int = 1, wire_format: WireFormat = "float32"
) -> tuple[Forward, list[Any]]:
    info, frame = encode("hidden", hidden, wire_format)
    message = Forward(request=7, purpose="train", lengths=lengths, target_tokens=targets, tensors=(info,))
    return message, [frame]


def backward(gradient: Tensor, wire_format: WireFormat = "float32") -> tuple[Backward, list[Any]]:
    info, frame = encode("gradient", gradient, wire_format)
    return Backward(request=8, forward=7, tensors=(info,)), [frame]


def update(values: list[tuple[str, Tensor]], wire_format: WireFormat = "float32") -> tuple[Update, list[Any]]:
    encoded = [encode(name, value, wire_format) for name, value in values]
    message = Update(request=9, round=0, weight=5, tensors=tuple(info for info, _ in encoded))
    return message, [frame for _, frame in encoded]


def test_good_messages_become_tickets() -> None:
    hidden = torch.randn(5, WIDTH)
    ticket = intake().forward(SESSION, *forward((3, 2), hidden, targets=4))
    assert (ticket.session, ticket.client, ticket.request) == (SESSION.id, "anna", 7)
    assert (ticket.tokens, ticket.weight) == (5, 4)
    assert isinstance(ticket.payload, Rows)
    assert torch.equal(ticket.payload.hidden, hidden)
    assert (ticket.payload.lengths, ticket.payload.target_tokens, ticket.payload.wants_gradient) == ((3, 2), 4, True)

    ticket = intake().backward(SESSION, *backward(hidden))
    assert (ticket.request, ticket.forward, ticket.tokens) == (8, 7, 5)
    assert torch.equal(ticket.payload, hidden)

    ticket = intake().update(SESSION, *update([("y", torch.ones(3)), ("x", torch.zeros(2, 2))]))
    assert (ticket.request, ticket.weight) == (9, 5)
    assert ticket.payload.keys() == {"x", "y"}

    assert intake().join(SESSION, Join(request=6, rows=3)).request == 6


@pytest.mark.parametrize(
    ("lengths", "rows", "width", "targets", "reason"),
    [
        ((10, 7), 17, WIDTH, 1, "too_many_tokens"),
        ((11,), 11, WIDTH, 1, "too_long"),
        ((3,), 3, WIDTH, 4, "target_tokens"),
        ((3,), 4, WIDTH, 1, "tensor"),
        ((3, 2), 3, WIDTH, 1, "tensor"),
        ((3,), 3, WIDTH + 1, 1, "tensor"),
    ],
)
def test_a_forward_out_of_bounds_is_refused(
    lengths: tuple[int, ...], rows: int, width: int, targets: int, reason: str
) -> None:
    with pytest.raises((Refused, TensorError)) as error:
        intake().forward(SESSION, *forward(lengths, torch.zeros(rows, width), targets))
    assert getattr(error.value, "reason", error.value.code) == reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    spoiled = torch.zeros(3, WIDTH)
    spoiled[1, 2] = value
    with pytest.raises(TensorError, match="NaN or infinite"):
        intake().forward(SESSION, *forward((3,), spoiled))
    with pytest.raises(TensorError, match="NaN or infinite"):
        intake().backward(SESSION, *backward(spoiled))
    with pytest.raises(TensorError, match="NaN or infinite"):
        intake().update(SESSION, *update([("x", torch.full((2, 2), value)), ("y", torch.zeros(3))]))


def test_another_number_format_than_the_jobs_is_refused() -> None:
    half = intake(hidden="bfloat16", gradient="float16")
    half.forward(SESSION, *forward((3,), torch.zeros(3, WIDTH), wire_format="bfloat16"))
    half.backward(SESSION, *backward(torch.zeros(3, WIDTH), "float16"))
    with pytest.raises(TensorError, match="the job says bfloat16"):
        half.forward(SESSION, *forward((3,), torch.zeros(3, WIDTH), wire_format="float32"))
    with pytest.raises(TensorError, match="the job says float16"):
        half.backward(SESSION, *backward(torch.zeros(3, WIDTH), "bfloat16"))
    with pytest.raises(TensorError, match="the job says float32"):
        half.update(SESSION, *update([("x", torch.zeros(2, 2)), ("y", torch.zeros(3))], "float16"))


def test_a_frame_of_another_size_is_refused() -> None:
    message, (frame,) = forward((3,), torch.zeros(3, WIDTH))
    with pytest.raises(TensorError, match="47 bytes"):
        intake().forward(SESSION, message, [frame[:-1]])


@pytest.mark.parametrize("count", [0, 2])
def test_a_request_has_one_tensor(count: int) -> None:
    infos, frames = zip(*[encode("hidden", torch.zeros(3, WIDTH), "float32")] * 2, strict=True)
    tensors = tuple(infos[:count])
    with pytest.raises(TensorError, match="one tensor"):
        intake().backward(SESSION, Backward(request=2, forward=1, tensors=tensors), frames[:count])
    message = Forward(request=1, purpose="train", lengths=(3,), target_tokens=1, tensors=tensors)
    with pytest.raises(TensorError, match="one tensor"):
        intake().forward(SESSION, message, frames[:count])


@pytest.mark.parametrize("names", [[], ["x"], ["x", "y", "z"], ["x", "x"], ["x", "z"], ["x", "y", "y"]])
def test_an_update_has_exactly_the_jobs_tensors(names: list[str]) -> None:
    values = [(name, torch.zeros(2, 2) if name == "x" else torch.zeros(3)) for name in names]
    with pytest.raises(TensorError, match="not those of the job"):
        intake().update(SESSION, *update(values))


def test_an_updates_tensors_have_the_jobs_shapes() -> None:
    with pytest.raises(TensorError, match="expected 2x2"):
        intake().update(SESSION, *update([("x", torch.zeros(4)), ("y", torch.zeros(3))]))


def test_a_weight_beyond_all_tokens_of_a_round_is_refused_where_tokens_weigh() -> None:
    """10 steps of 1 row of at most 10 tokens."""
    values = [("x", torch.zeros(2, 2)), ("y", torch.zeros(3))]
    message, frames = update(values)
    most = message.model_copy(update={"weight": 100})
    assert intake().update(SESSION, most, frames).weight == 100
    beyond = message.model_copy(update={"weight": 101})
    with pytest.raises(Refused, match="a weight of 101") as error:
        intake().update(SESSION, beyond, frames)
    assert error.value.reason == "weight"
    by_rows = intake().job.model_copy(update={"rounds": Rounds(weighting="rows")})
    assert replace(intake(), job=by_rows).update(SESSION, beyond, frames).weight == 101


def test_where_all_clients_count_alike_any_other_weight_is_refused() -> None:
    message, frames = update([("x", torch.zeros(2, 2)), ("y", torch.zeros(3))])
    alike = replace(intake(), job=intake().job.model_copy(update={"rounds": Rounds(weighting="clients")}))
    assert alike.update(SESSION, message.model_copy(update={"weight": 1}), frames).weight == 1
    with pytest.raises(Refused, match="all clients count alike") as error:
        alike.update(SESSION, message.model_copy(update={"weight": 2}), frames)
    assert error.value.reason == "weight"
