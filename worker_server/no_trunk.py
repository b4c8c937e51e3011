"""What stands where the server has no trunk, in plain FedAvg: no weights, no state, no steps."""

from collections.abc import Mapping

from torch import Tensor


class NoTrunk:
    """Rounds begin and end; there is nothing to average but what clients hand in. Methods as in Trunk."""

    steps = 0.0

    def own_start(self) -> dict[str, Tensor]:
        return {}

    def own_values(self, client: str) -> dict[str, Tensor]:
        return {}

    def end_round(self, own: Mapping[str, Tensor]) -> None:
        """Nothing is kept of a round."""

    def round_values(self) -> dict[str, Tensor]:
        return {}

    def take_round_values(self, values: Mapping[str, Tensor]) -> None:
        """There are none."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor], steps: float) -> None:
        """There is none."""

    def take_residuals(self, state: Mapping[str, Tensor]) -> None:
        """There are no weights to add them to."""
