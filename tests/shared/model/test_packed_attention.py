"""All rows in one kernel, as on CUDA, against each row by itself."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model.packing import attend_together, packed_attention, row_mask

LENGTHS = [5, 1, 9, 3]
HEADS, GROUPS, WIDTH = 4, 2, 8


def tensors(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def row_by_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = zip(*(torch.split(x, LENGTHS, 2) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True) for q, k, v in rows], 2
    )


def test_rows_reach_the_kernel_as_jagged_tensors_and_come_back_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the kernel on CUDA alone; in its place each row of the jagged tensors is attended by itself."""
    inputs = tensors()
    expected = row_by_row(*inputs)
    one_row = F.scaled_dot_product_attention

    def kernel(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        rows = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        outputs = [one_row(q, k, v, **settings).transpose(0, 1) for q, k, v in rows]
        return torch.nested.nested_tensor(outputs, layout=torch.jagged).transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    offsets = row_mask(LENGTHS).offsets  # type: ignore[attr-defined]
    output = attend_together(inputs[0], inputs[1], inputs[2], LENGTHS, offsets, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(output, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_cuda_outputs_and_gradients_are_those_of_single_rows(dtype: torch.dtype, tolerance: float) -> None:
    inputs = tensors("cuda", dtype)
    together, _ = packed_attention(None, inputs[0], inputs[1], inputs[2], row_mask(LENGTHS, "cuda"), scaling=0.3)
    apart = row_by_row(*inputs).transpose(1, 2)
    torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)
    into = torch.randn_like(together)
    for one, other in zip(
        torch.autograd.grad(together, inputs, into), torch.autograd.grad(apart, inputs, into), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
