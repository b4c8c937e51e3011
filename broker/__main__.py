"""`python -m broker`: the broker alone, where nothing but pyzmq, msgpack and pydantic is installed.

Exit codes: 0 stopped by SIGTERM or Ctrl-C, 2 an address cannot be bound, 4 bad arguments.
"""

import argparse
import signal
import sys
from typing import NoReturn

from broker.service import Broker
from broker.settings import BrokerSettings
from shared.errors import ConnectionFailed, UsageError
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
    parser.add_argument("--log-format", choices=("txt", "json"), help="text on a terminal, JSON lines elsewhere")
    given = parser.parse_args(arguments)
    configure("broker", format=given.log_format)
    broker = Broker(BrokerSettings(frontend=given.clients_address, backend=given.servers_address))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: broker.stop())
    try:
        with broker:
            broker.run()
    except ConnectionFailed as error:
        print(f"broker: {error.message} ({error.hint})", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
