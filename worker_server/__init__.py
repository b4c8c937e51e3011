"""The trunk: sessions, cohorts, its trained parameters and their optimizer, aggregation, checkpoints."""

from shared import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION"]
