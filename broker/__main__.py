"""`python -m broker`: the broker alone, where neither torch nor transformers is installed.

Exit codes: 0 stopped by SIGTERM or Ctrl-C, 2 an address cannot be bound, 4 bad arguments or files.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from broker.guard import guard_of
from broker.service import Broker
from broker.settings import BrokerSettings
from shared.errors import FlglmError, UsageError
from shared.heap import keep_freed_memory
from shared.logs import configure

DEFAULTS = BrokerSettings()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"broker: {message} ('python -m broker --help' lists the options)\n")


def main(arguments: list[str] | None = None) -> int:
    """Route until SIGTERM or SIGINT; the exit code."""
    parser = _Parser(prog="broker", description="Route sealed messages between clients and servers.")
    parser.add_argument("--clients-address", default=DEFAULTS.frontend, help="where clients connect (%(default)s)")
    parser.add_argument("--servers-address", default=DEFAULTS.backend, help="where servers connect (%(default)s)")
    parser.add_argument("--key", type=Path, help="the broker's .key file")
    parser.add_argument("--clients", type=Path, default=Path("clients"), help="folder with the cards of clients")
    parser.add_argument("--servers", type=Path, default=Path("servers"), help="folder with the cards of servers")
    parser.add_argument("--plain", action="store_true", help="links without keys, on this machine alone")
    parser.add_argument("--log-format", choices=("txt", "json"), help="text on a terminal, JSON lines elsewhere")
    given = parser.parse_args(arguments)
    configure("broker", format=given.log_format)
    keep_freed_memory()
    try:
        guard = guard_of(given.key, given.clients, given.servers, plain=given.plain)
        broker = Broker(BrokerSettings(frontend=given.clients_address, backend=given.servers_address), guard=guard)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: broker.stop())
        with broker:
            broker.run()
    except FlglmError as error:
        print(f"broker: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
