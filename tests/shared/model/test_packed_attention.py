"""All rows in one kernel, as on CUDA, against each row by itself."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.model.packing import PREFIX, attend_together, attend_together_with_prefix, packed_attention, row_mask

LENGTHS = [5, 1, 9, 3]
HEADS, GROUPS, WIDTH = 4, 2, 8
VIRTUAL = 3


def tensors(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def row_by_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = zip(*(torch.split(x, LENGTHS, 2) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True) for q, k, v in rows], 2
    )


def prefixes(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Keys and values, another for each row."""
    shape = (len(LENGTHS), GROUPS, VIRTUAL, WIDTH)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2)]


def row_by_row_with_prefix(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Written out: no kernel's causality."""
    outputs = []
    for place, (q, k, v) in enumerate(zip(*(torch.split(x, LENGTHS, 2) for x in (query, key, value)), strict=True)):
        k, v = torch.cat((keys[place, None], k), 2), torch.cat((values[place, None], v), 2)
        k, v = k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)
        n = q.shape[2]
        seen = torch.cat((torch.ones(n, VIRTUAL), torch.ones(n, n).tril()), 1).bool().to(q.device)
        outputs.append((q @ k.mT * 0.3).masked_fill(~seen, float("-inf")).softmax(-1) @ v)
    return torch.cat(outputs, 2)


def kernel_of(one_row: Any) -> Any:
    """In place of the kernel that torch has on CUDA alone."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        rows = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        outputs = [one_row(q, k, v, **settings).transpose(0, 1) for q, k, v in rows]
        return torch.nested.nested_tensor(outputs, layout=torch.jagged).transpose(1, 2)

    return kernel


def test_rows_reach_the_kernel_as_jagged_tensors_and_come_back_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the kernel on CUDA alone; in its place each row of the jagged tensors is attended by itself."""
    inputs = tensors()
    expected = row_by_row(*inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel_of(F.scaled_dot_product_attention))
    offsets = row_mask(LENGTHS).offsets  # type: ignore[attr-defined]
    output = attend_together(inputs[0], inputs[1], inputs[2], LENGTHS, offsets, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(output, expected)


def test_a_prefix_comes_before_each_row_and_gets_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, prefix = tensors(), prefixes()
    expected = row_by_row_with_prefix(*inputs, *prefix)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel_of(F.scaled_dot_product_attention))
    offsets = row_mask(LENGTHS).offsets  # type: ignore[attr-defined]
    output = attend_together_with_prefix(
        inputs[0], inputs[1], inputs[2], (prefix[0], prefix[1]), LENGTHS, offsets, scaling=0.3, dropout=0.0
    )
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


class RowsPrefix(nn.Module):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.pair = (keys, values)

    def of_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        assert rows == len(LENGTHS)
        return self.pair


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [("cpu", torch.float32, 1e-5), ("cuda", torch.float32, 1e-5), ("cuda", torch.bfloat16, 2e-2)],
)
def test_rows_attend_to_their_own_prefix(device: str, dtype: torch.dtype, tolerance: float) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    inputs, prefix = tensors(device, dtype), prefixes(device, dtype)
    module = nn.Module()
    setattr(module, PREFIX, RowsPrefix(prefix[0], prefix[1]))
    together, _ = packed_attention(module, inputs[0], inputs[1], inputs[2], row_mask(LENGTHS, device), scaling=0.3)
    apart = row_by_row_with_prefix(*inputs, *prefix).transpose(1, 2)
    torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)
    into, leaves = torch.randn_like(together), [*inputs, *prefix]
    for one, other in zip(
        torch.autograd.grad(together, leaves, into), torch.autograd.grad(apart, leaves, into), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
