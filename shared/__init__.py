"""What crosses a boundary: wire, sealing, payloads, identities, settings, model splitting."""

PROTOCOL_VERSION = 1
