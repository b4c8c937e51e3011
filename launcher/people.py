"""The commands that make and pass on people's files: keys, cards, invitations, admissions."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from launcher.output import Format, FormatOption, succeed
from shared.identity import Invitation, admit, create_identity, fingerprint, load_card, revoke, write_invitation
from shared.job import load_job

ClientsOption = Annotated[Path, typer.Option("--clients", help="folder with the cards of admitted clients")]


def new_keys(
    name: Annotated[str, typer.Argument(help="who it is for, such as hospital-a")],
    directory: Annotated[Path, typer.Option("--dir", help="where the two files go")] = Path("keys"),
    format: FormatOption = Format.TXT,
) -> None:
    """Make an identity: a private key, which never leaves this machine, and a card to give to others."""
    identity = create_identity(directory, name)
    mark = fingerprint(identity.public)
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


def admit_card(
    card: Annotated[Path, typer.Argument(help="the client's .card file")],
    clients: ClientsOption = Path("clients"),
    format: FormatOption = Format.TXT,
) -> None:
    """Admit a client: its key may open sessions from now on. A running server need not be restarted."""
    admitted = admit(card, clients)
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
    """Take a client's admission back: it opens no new session."""
    revoke(name, clients)
    succeed(format, f"revoked {name}", {"name": name})


def invite(
    name: Annotated[str, typer.Argument(help="the client's name")],
    job: Annotated[Path, typer.Option("--job", help="the job file")],
    server: Annotated[Path, typer.Option("--server", help="the server's .card file")],
    broker: Annotated[list[str], typer.Option("--broker", help="the broker's address for clients")],
    out: Annotated[Path | None, typer.Option("--out", help="the invitation file; NAME.invite by default")] = None,
    days: Annotated[float, typer.Option("--days", min=0.01, max=3650, help="how long it is valid")] = 30,
    format: FormatOption = Format.TXT,
) -> None:
    """Write an invitation: where the broker is, which server, which job, until when."""
    card = load_card(server)
    invitation = Invitation(
        client=name,
        brokers=broker,
        server=card.name,
        server_public_key=card.public_key,
        job=load_job(job).digest().hex(),
        expires_at=datetime.now(UTC) + timedelta(days=days),
    )
    path = out or Path(f"{name}.invite")
    write_invitation(path, invitation)
    succeed(
        format,
        f"invitation   {path}\nserver       {card.name}  {card.fingerprint}",
        {"invitation": str(path), "server": card.name, "fingerprint": card.fingerprint},
    )
