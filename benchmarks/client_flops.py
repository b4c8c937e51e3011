"""Floating point operations of a client's training step: products of matrices, counted by torch.utils.flop_counter.

In split training those of head and tail, forward and backward; in plain FedAvg those of the trunk too. Attention is
counted in its plain form, all of the square.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worker_client.batches import Batch
from worker_client.head_tail import HeadTail


def step_flops(parts: HeadTail, batch: Batch) -> int:
    """Of one batch's forward and backward at the client; gradients are dropped."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = parts.hidden(batch)
        arriving = hidden.detach().requires_grad_()
        output = arriving
        if parts.trunk is not None:
            output = parts.trunk.forward(arriving, batch.lengths)
        leaving = output.detach().requires_grad_()
        torch.autograd.backward(parts.loss(leaving, batch))
        if parts.trunk is not None:
            torch.autograd.backward(output, leaving.grad)
        if parts.head_is_trained:
            gradient = arriving.grad if parts.trunk is not None else leaving.grad
            torch.autograd.backward(hidden, gradient)
    for parameter in parts.parameters.values():
        parameter.grad = None
    return int(counter.get_total_flops())
