"""The broker: routes sealed messages between clients and servers, and can open none of them."""

from shared import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION"]
