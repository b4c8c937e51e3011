"""The commands that make and pass on people's files: keys, cards, invitations, admissions."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from launcher.output import Format, FormatOption, succeed
from shared.allow_list import admit, revoke
from shared.errors import UsageError
from shared.group_keys import create_group_key
from shared.group_keys import fingerprint as group_fingerprint
from shared.identity import Identity, create_identity, fingerprint, load_card
from shared.invitations import BrokerAt, Invitation, load_invitation, new_id, write_invitation
from shared.job import load_job

PlainOption = Annotated[bool, typer.Option("--plain", help="links without keys, on this machine alone")]
BrokerCardsOption = Annotated[
    list[Path] | None, typer.Option("--broker-card", help="the .card of each --broker, or one for all")
]
MetricsOption = Annotated[
    str | None, typer.Option("--metrics-address", help="host:port for /metrics, /health and /ready; none by default")
]
ClientsOption = Annotated[Path, typer.Option("--clients", help="folder with the cards of admitted clients")]


def new_keys(
    name: Annotated[str, typer.Argument(help="who it is for, such as hospital-a")],
    directory: Annotated[Path, typer.Option("--dir", help="where the two files go")] = Path("keys"),
    format: FormatOption = Format.TXT,
) -> None:
    """Make an identity: a private key, which never leaves this machine, and a card to give to others."""
    _made(create_identity(directory, name), directory, format)


def join(
    invite: Annotated[Path, typer.Argument(help="the invitation that the operator sent")],
    directory: Annotated[Path, typer.Option("--dir", help="where the two files go")] = Path("keys"),
    format: FormatOption = Format.TXT,
) -> None:
    """Answer an invitation: make this site's keys, and the card to send back."""
    invitation = load_invitation(invite, datetime.now(UTC))
    _made(create_identity(directory, invitation.client, invitation.id), directory, format)


def _made(identity: Identity, directory: Path, format: Format) -> None:
    name, mark = identity.name, fingerprint(identity.public, identity.link.public)
    succeed(
        format,
        f"private key  {directory / name}.key   (keep it here)\n"
        f"card         {directory / name}.card  (give it to the others)\n"
        f"fingerprint  {mark}  (compare it by telephone)",
        {"key": f"{directory / name}.key", "card": f"{directory / name}.card", "fingerprint": mark},
    )


def show_card(card: Annotated[Path, typer.Argument(help="a .card file")], format: FormatOption = Format.TXT) -> None:
    """Show whose card this is, with its fingerprint."""
    shown = load_card(card)
    succeed(format, f"{shown.name}  {shown.fingerprint}", {"name": shown.name, "fingerprint": shown.fingerprint})


def new_group_key(
    out: Annotated[Path, typer.Option("--out", help="the key file to write")] = Path("group.key"),
    format: FormatOption = Format.TXT,
) -> None:
    """Make a key that the data owners of a job share, so that its server sees neither sums nor averages."""
    mark = group_fingerprint(create_group_key(out))
    succeed(
        format,
        f"group key    {out}   (for the other data owners alone: never through the server or its operator)\n"
        f"in the job   aggregation: {{group_key: {mark}}}",
        {"key": str(out), "fingerprint": mark},
    )


def admit_card(
    card: Annotated[Path, typer.Argument(help="a .card file")],
    clients: ClientsOption = Path("clients"),
    format: FormatOption = Format.TXT,
) -> None:
    """Admit a client (or with --clients servers, at a broker, a server): at once, nothing need be restarted."""
    admitted = admit(card, clients, datetime.now(UTC))
    succeed(
        format,
        f"admitted {admitted.name}  {admitted.fingerprint}",
        {"name": admitted.name, "fingerprint": admitted.fingerprint},
    )


def revoke_client(
    name: Annotated[str, typer.Argument(help="the client's name")],
    clients: ClientsOption = Path("clients"),
    format: FormatOption = Format.TXT,
) -> None:
    """Take an admission back: whoever it was is out within a second, open sessions included."""
    revoke(name, clients)
    succeed(format, f"revoked {name}", {"name": name})


def invite(
    name: Annotated[str, typer.Argument(help="the client's name")],
    job: Annotated[Path, typer.Option("--job", help="the job file")],
    server: Annotated[Path, typer.Option("--server", help="the server's .card file")],
    broker: Annotated[list[str], typer.Option("--broker", help="a broker's address for clients; several are tried")],
    broker_card: BrokerCardsOption = None,
    clients: Annotated[Path, typer.Option("--clients", help="where the card that comes back is admitted")] = Path(
        "clients"
    ),
    out: Annotated[Path | None, typer.Option("--out", help="the invitation file; NAME.invite by default")] = None,
    plain: PlainOption = False,
    days: Annotated[float, typer.Option("--days", min=0.01, max=3650, help="how long it is valid")] = 30,
    format: FormatOption = Format.TXT,
) -> None:
    """Write an invitation: where the brokers are, which server, which job, until when. It admits one card."""
    card = load_card(server)
    invitation = Invitation(
        id=new_id(),
        client=name,
        brokers=brokers_at(broker, broker_card or [], plain),
        server=card.name,
        server_public_key=card.public_key,
        job=load_job(job).digest().hex(),
        expires_at=datetime.now(UTC) + timedelta(days=days),
    )
    path = out or Path(f"{name}.invite")
    write_invitation(path, invitation, clients)
    succeed(
        format,
        f"invitation   {path}\nserver       {card.name}  {card.fingerprint}",
        {"invitation": str(path), "server": card.name, "fingerprint": card.fingerprint},
    )


def brokers_at(addresses: list[str], cards: list[Path], plain: bool) -> list[BrokerAt]:
    """Each with its key, or on this machine plain, if that was asked for. Raises UsageError."""
    if plain == bool(cards):
        raise UsageError("--broker needs --broker-card", hint="ask the broker's operator for it, or say --plain")
    if len(cards) > 1 and len(cards) != len(addresses):
        raise UsageError(
            f"{len(cards)} times --broker-card for {len(addresses)} times --broker", hint="one each, or one"
        )
    keys = [load_card(card).link_key for card in cards]
    keys_of = keys if len(keys) > 1 else [keys[0] if keys else None] * len(addresses)
    try:
        return [BrokerAt(address=address, key=key) for address, key in zip(addresses, keys_of, strict=True)]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise UsageError(f"--broker: {first['msg']}", hint="tcp://host:port, with --broker-card") from None
