"""Tensors as one vector: the order is the protocol's, and nothing is lost on the way there and back."""

import pytest
import torch

from shared import flat

SHAPES = {"b": (2, 3), "a": (), "c.10": (1, 0, 4), "c.9": (2,), "B": (1, 1)}


def test_values_lie_end_to_end_in_the_order_of_their_names() -> None:
    tensors = {
        "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(),
        "a.9": torch.tensor(5.0),
        "a.10": torch.tensor([6.0], requires_grad=True),
        "B": torch.tensor([7], dtype=torch.int8),
    }
    vector = flat.join(tensors)
    assert vector.tolist() == [7.0, 6.0, 5.0, 1.0, 3.0, 2.0, 4.0]
    assert (vector.dtype, vector.requires_grad) == (torch.float32, False)
    vector.zero_()
    assert tensors["a.10"].item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_parts_into_what_it_was_joined_of(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random, dtype=dtype) for name, shape in SHAPES.items()}
    vector = flat.join(tensors, dtype)
    assert len(vector) == flat.length(SHAPES) == 10
    back = flat.part(vector, SHAPES)
    assert list(back) == sorted(SHAPES)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == dtype for name in SHAPES)


def test_a_vector_of_another_length_is_no_such_tensors() -> None:
    for wrong in (9, 11):
        with pytest.raises(RuntimeError):
            flat.part(torch.zeros(wrong), SHAPES)
