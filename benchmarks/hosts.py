"""Several hosts on one machine: network namespaces with an address each, cables between them, and weather on those.

    yard: bridge ── name ══ eth0  host, 10.77.0.1
                 ── name ══ eth0  host, 10.77.0.2

All of it lies in a user namespace of its own and needs no rights over the machine's network. A namespace is held by an
idle process that ends when its standard input does: whatever becomes of this process, nothing is left behind. Delay
and loss are netem's; where the kernel has none, `benchmarks.slow_switch` takes the bridge's place.
"""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
# Every host's own name for its cable.
CABLE = "eth0"
WAIT_S = 10.0


class Unavailable(Exception):
    """This machine lets nobody make network namespaces, or lacks the tools."""


@dataclass(frozen=True)
class Weather:
    """What a cable does to what a host sends: delay, give or take `jitter_ms`, and the share that is lost."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0

    @property
    def netem(self) -> list[str]:
        """In the words of tc."""
        return ["netem", "delay", f"{self.delay_ms}ms", f"{self.jitter_ms}ms", "loss", f"{100 * self.loss}%"]


CALM = Weather()


class Namespace:
    """A network namespace, in a user namespace that is its own or that of `inside`. Ends with `close()`."""

    def __init__(self, inside: "Namespace | None" = None) -> None:
        """Raises Unavailable."""
        enter = ["unshare", "--user", "--map-root-user"] if inside is None else [*inside.within, "unshare"]
        pipe = subprocess.PIPE
        try:
            self._holder = subprocess.Popen([*enter, "--net", "cat"], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        except OSError as error:
            raise Unavailable(f"{enter[0]}: {error.strerror}") from None
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        try:
            self._holder.stdin.write("there\n")
            self._holder.stdin.flush()
            there = self._holder.stdout.readline()
        except BrokenPipeError:
            there = ""
        if not there:
            _, said = self._holder.communicate(timeout=WAIT_S)
            raise Unavailable(f"{' '.join(enter)} --net: {said.strip()}")

    @property
    def id(self) -> int:
        """A process in it."""
        return self._holder.pid

    @property
    def within(self) -> list[str]:
        """The words before a command that is to run in it; the command's process is the one that is started."""
        return ["nsenter", "--target", str(self.id), "--user", "--net", "--preserve-credentials", "--"]

    def do(self, *words: str) -> None:
        """Run `words` in it. Raises Unavailable."""
        try:
            subprocess.run([*self.within, *words], check=True, capture_output=True, text=True, timeout=WAIT_S)
        except OSError as error:
            raise Unavailable(f"{words[0]}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{' '.join(words)}: {error.stderr.strip()}") from None

    def close(self) -> None:
        self._holder.communicate(timeout=WAIT_S)


class Hosts:
    """A context manager: hosts called `names`, joined by cables with this weather."""

    def __init__(self, names: Sequence[str], weather: Weather = CALM) -> None:
        self.names = list(names)
        self.weather = weather
        self._open = ExitStack()
        self._hosts: dict[str, Namespace] = {}

    def __enter__(self) -> "Hosts":
        """Raises Unavailable; nothing is left then."""
        with ExitStack() as making:
            self._yard = making.enter_context(closing(Namespace()))
            for name in self.names:
                self._hosts[name] = making.enter_context(closing(Namespace(self._yard)))
                self._lay_cable(name)
            if self.weather == CALM or self._has_netem():
                self._bridge()
            else:
                making.enter_context(self._switch())
            self._open = making.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def within(self, name: str) -> list[str]:
        """The words before a command that is to run on this host."""
        return self._hosts[name].within

    def cut(self, name: str) -> None:
        """Pull the host's cable out of the bridge: it keeps its address, and neither end is told anything."""
        self._yard.do("ip", "link", "set", "dev", name, "down")

    def mend(self, name: str) -> None:
        self._yard.do("ip", "link", "set", "dev", name, "up")

    def _lay_cable(self, name: str) -> None:
        host = self._hosts[name]
        self._yard.do("ip", "link", "add", "name", name, "type", "veth", "peer", "name", CABLE, "netns", str(host.id))
        self._yard.do("ip", "link", "set", "dev", name, "addrgenmode", "none", "up")
        host.do("ip", "link", "set", "dev", "lo", "up")
        host.do("ip", "address", "add", f"{self.address(name)}/24", "dev", CABLE)
        host.do("ip", "link", "set", "dev", CABLE, "addrgenmode", "none", "up")

    def _has_netem(self) -> bool:
        """Put it on every cable, if the kernel has it."""
        try:
            for host in self._hosts.values():
                host.do("tc", "qdisc", "add", "dev", CABLE, "root", *self.weather.netem)
        except Unavailable as error:
            if "kind is unknown" not in str(error):
                raise
            return False
        return True

    def _bridge(self) -> None:
        self._yard.do("ip", "link", "add", "name", "bridge", "type", "bridge")
        self._yard.do("ip", "link", "set", "dev", "bridge", "addrgenmode", "none", "up")
        for name in self.names:
            self._yard.do("ip", "link", "set", "dev", name, "master", "bridge")

    def _switch(self) -> "_Switch":
        weather = [str(value) for value in (self.weather.delay_ms, self.weather.jitter_ms, self.weather.loss)]
        return _Switch([*self._yard.within, sys.executable, "-m", "benchmarks.slow_switch", *weather, *self.names])


class _Switch:
    """The process of benchmarks.slow_switch."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def __enter__(self) -> None:
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            self.__exit__()
            raise Unavailable("benchmarks.slow_switch did not start")

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=WAIT_S)
