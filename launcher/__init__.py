"""The `flglm` command: people's files, roles as processes, the demo and its report."""

from shared import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION"]
