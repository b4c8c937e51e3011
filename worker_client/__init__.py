"""The private side: data, tokenizer, head and tail, labels, loss."""

from shared import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION"]
