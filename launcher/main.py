"""The entry point of `flglm`: commands, and what becomes of their errors.

Exit codes: 0 ok, 1 refused, 2 connection or authentication, 3 timeout, 4 bad arguments or files, 5 internal,
130 interrupted.
"""

import os
import sys
import traceback
from types import TracebackType

import typer

from launcher import (
    check_command,
    data_command,
    demo_command,
    eval_command,
    partition_command,
    people,
    privacy_command,
    roles,
    top_command,
)
from launcher.output import fail
from loadtest import command as load
from shared.errors import FlglmError, UsageError

INTERRUPTED = 130
# What typer raises for wrong words on the command line; depending on its version click's own or a copy of it.
WrongWords: type[typer.BadParameter] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="flglm",
    help="Split federated training of large language models: the data stays at home.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
client = typer.Typer(help="A data owner's side.", no_args_is_help=True)
check = typer.Typer(help="Before a role is started: what is wrong, and what to type to mend it.", no_args_is_help=True)
data = typer.Typer(help="Rows before they are trained on.", no_args_is_help=True)
privacy = typer.Typer(help="Differential privacy: what it costs, and what was spent.", no_args_is_help=True)
keys = typer.Typer(help="Identities: private keys and the cards that go with them.", no_args_is_help=True)

app.command("demo")(demo_command.demo)
app.add_typer(keys, name="keys")
keys.command("new")(people.new_keys)
keys.command("show")(people.show_card)
keys.command("group")(people.new_group_key)
app.command("invite")(people.invite)
app.command("join")(people.join)
app.command("admit")(people.admit_card)
app.command("revoke")(people.revoke_client)
app.command("broker")(roles.broker)
app.command("server")(roles.server)
app.command("up")(roles.up)
app.add_typer(check, name="check")
check.command("broker")(check_command.check_broker)
check.command("server")(check_command.check_server)
check.command("client")(check_command.check_client)
app.command("top")(top_command.top)
app.add_typer(data, name="data")
data.command("check")(data_command.check_data)
app.add_typer(privacy, name="privacy")
privacy.command("epsilon")(privacy_command.plan)
privacy.command("ledger")(privacy_command.show)
app.command("eval")(eval_command.evaluate)
app.command("partition")(partition_command.partition)
app.command("loadtest")(load.loadtest)
app.command("loadtest-crowd", hidden=True)(load.crowd)
app.add_typer(client, name="client")
client.command("train")(roles.client_train)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code."""
    words = sys.argv[1:] if arguments is None else arguments
    if arguments is None:
        sys.excepthook = _crashed
    machine = any(word in ("json", "jsonl", "--format=json", "--format=jsonl") for word in words)
    try:
        sys.exit(app(args=words, standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except WrongWords as error:
        if message := error.format_message():  # empty where the help was shown instead
            fail(UsageError(message, hint="'flglm --help' lists commands and options"), machine=machine)
        sys.exit(UsageError.exit_code)
    except FlglmError as error:
        fail(error, machine=machine)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("flglm: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What flglm did not raise on purpose: a traceback, and the exit code "internal". Python's own would be "refused",
    after which no supervisor starts a role again.
    """
    traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    os._exit(FlglmError.exit_code)


if __name__ == "__main__":
    main()
