"""From noise to epsilon: Gaussian mechanisms, composed, by Google's dp-accounting.

A round's release is a Gaussian mechanism of sensitivity 1 and standard deviation the noise multiplier z. Any of them
one after the other, each chosen by what came before, are as private as a single one of 1 / z^2 = the sum of all 1 / z^2
(Dong et al., arXiv 1905.02383, corollary 3.3 and theorem 3.2), whose epsilon at a delta is known exactly (Balle and
Wang, arXiv 1805.06530, theorem 8). No amplification by sampling is claimed: who takes part is no secret.
"""

import math
from collections.abc import Iterable

from shared.errors import UsageError

# Of 1 / sigma^2. Beyond it, where epsilon is half a million, float64 does not hold the exact form any more: what
# zero-concentrated privacy bounds it by (Bun and Steinke, arXiv 1605.02635, propositions 1.6 and 1.3) is taken instead.
MOST_EXACT = 1e6


def epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float:
    """Of so many releases of each noise multiplier, (multiplier, how many), together. 0 of none. Raises UsageError."""
    try:
        # It loads scipy, which takes a second, and most jobs need neither.
        from dp_accounting import get_epsilon_gaussian
    except ImportError:
        raise UsageError("epsilon is computed by dp-accounting", hint="pip install '.[worker]'") from None
    precision = math.fsum(count / multiplier**2 for multiplier, count in releases)
    if precision == 0:
        return 0.0
    if precision > MOST_EXACT:
        return precision / 2 + math.sqrt(2 * precision * math.log(1 / delta))
    return float(get_epsilon_gaussian(1 / math.sqrt(precision), delta))
