"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): FedAvg of LoRA's factors, made exact by a residual.

The mean of the clients' products B_i A_i is not the product of the mean factors. The difference, (out, in) a module,
goes into the frozen weight; what has gone there in all rounds is the state, `residual/<module>`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.model.residuals import FACTOR_A, FACTOR_B, modules_of
from shared.payload.messages import RESIDUAL
from worker_server.aggregators.method import Tensors, Update, difference


def mean_products(start: Tensors, updates: Sequence[Update]) -> dict[str, Tensor]:
    """The mean of B_i A_i by module, weighted, float64; of no updates, that of the start."""
    means: dict[str, Tensor] = {}
    for module in modules_of(start):
        a, b = start[module + FACTOR_A].double(), start[module + FACTOR_B].double()
        if not updates:
            means[module] = b @ a
            continue
        total = sum(update.weight for update in updates)
        means[module] = torch.zeros(len(b), a.shape[1], dtype=torch.float64, device=a.device)
        for update in updates:
            mine_a = a + difference(start, update, module + FACTOR_A)
            mine_b = b + difference(start, update, module + FACTOR_B)
            means[module] += mine_b @ mine_a * (update.weight / total)
    return means


def residuals(products: Tensors, values: Tensors, state: Tensors) -> dict[str, Tensor]:
    """The state after a round that ended with `values`, float32."""
    after: dict[str, Tensor] = {}
    for module, product in products.items():
        kept = values[module + FACTOR_B].double() @ values[module + FACTOR_A].double()
        before = state.get(RESIDUAL + module, torch.zeros(())).to(product.device, torch.float64)
        after[RESIDUAL + module] = (before + product - kept).float()
    return after
