"""A worker's view of its broker's life: when to ping, and when silence means that it is gone."""


class Heartbeat:
    """Times in seconds of one monotonic clock. A PING every `interval_s`; silence of `timeout_s` is death."""

    def __init__(self, interval_s: float, timeout_s: float, now: float) -> None:
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self._heard = now
        self._pinged = now

    def heard(self, now: float) -> None:
        """Anything came from the broker."""
        self._heard = now

    def ping_due(self, now: float) -> bool:
        """Whether to send a PING now; counts it as sent."""
        if now - self._pinged < self.interval_s:
            return False
        self._pinged = now
        return True

    def expired(self, now: float) -> bool:
        return now - self._heard > self.timeout_s
