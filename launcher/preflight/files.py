"""What people hold: keys, cards, invitations, the job, and the clock by which invitations expire."""

import shlex
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import shared
from launcher.preflight.checks import Check, Checklist, fail, ok, warn
from shared.allow_list import AllowList
from shared.errors import FlglmError, KeyFileError
from shared.identity import Identity, load_identity
from shared.invitations import Invitation, load_invitation
from shared.job import Job, load_job
from shared.job.secure import why_off

# The clock of a machine that was set by hand may be off by this much, and nothing will go wrong.
CLOCK_SLACK = timedelta(minutes=2)
SOON = timedelta(days=2)
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
SHOWN_DIGITS = 16


def identity_of(rows: Checklist, path: Path) -> Identity | None:
    """Row "key": there, readable by its owner alone, and a private key."""
    return rows.attempt("key", lambda: load_identity(path), lambda who: f"{who.name}, {path}", key_mend(path))


def key_mend(path: Path) -> str:
    try:
        shared_with_others = path.stat().st_mode & 0o077
    except OSError:
        return "name the file with --key, or make one with 'flglm keys new NAME'"
    if shared_with_others:
        return f"chmod 600 {shlex.quote(str(path))}"
    return "restore the file from your copy, or make another with 'flglm keys new NAME' and send its card"


def check_cards(name: str, folder: Path, wanted: int = 1) -> Check:
    """A folder of cards can be read, and admits as many as are `wanted`."""
    try:
        cards = AllowList(folder).cards()
    except KeyFileError as error:
        return fail(
            name, error.message, error.hint or f"mkdir -p {shlex.quote(str(folder))}, or mend the card it names"
        )
    names = sorted(card.name for card in cards.values())
    found = f"{folder} admits {len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    if len(names) < wanted:
        return warn(name, found if names else f"{folder} admits nobody", f"flglm admit CARD --clients {folder}")
    return ok(name, found)


def check_clock(now: datetime, witnesses: Iterable[Path]) -> Check:
    """A file that was written after `now` says that this machine's clock is slow; expiry dates hang on it."""
    latest, newest = LONG_AGO, None
    for path in (Path(shared.__file__), *witnesses):
        try:
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except OSError:
            continue
        if written > latest:
            latest, newest = written, path
    if latest > now + CLOCK_SLACK:
        return warn(
            "clock",
            f"this machine says {now:%Y-%m-%d %H:%M} UTC, but {newest} was written {latest:%Y-%m-%d %H:%M} UTC",
            "set the clock (timedatectl set-ntp true): invitations expire by it",
        )
    return ok("clock", f"{now:%Y-%m-%d %H:%M} UTC")


def invitation_of(rows: Checklist, path: Path, now: datetime) -> Invitation | None:
    """Rows "invitation": readable, and not expired. An expired one is returned as well: the rest can be looked at."""
    try:
        invitation = load_invitation(path, LONG_AGO)
    except KeyFileError as error:
        rows.add(fail("invitation", error.message, error.hint or "ask the operator for it again, or name it: --invite"))
        return None
    rows.add(check_expiry(path, invitation, now))
    return invitation


def check_expiry(path: Path, invitation: Invitation, now: datetime) -> Check:
    until = f"{invitation.expires_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if invitation.expires_at <= now:
        return fail("invitation", f"{path} expired at {until}", "ask the operator for a new one: flglm invite")
    if invitation.expires_at <= now + SOON:
        return warn("invitation", f"{path} is valid until {until}", "start before, or ask the operator for a new one")
    return ok("invitation", f"of {invitation.client} by {invitation.server}, valid until {until}")


def check_owner(identity: Identity, invitation: Invitation) -> Check | None:
    """Something to say only where the key has another name than the invitation."""
    if identity.name == invitation.client:
        return None
    return warn(
        "owner",
        f"the key is {identity.name}'s, the invitation {invitation.client}'s",
        "name the key that 'flglm join' made for this invitation",
    )


def job_of(rows: Checklist, path: Path) -> Job | None:
    """Row "job": a valid job file."""
    return rows.attempt(
        "job", lambda: load_job(path), lambda job: describe(job), "mend the job file, or name it: --job"
    )


def describe(job: Job) -> str:
    return f"{job.name}, {job.rounds.count} rounds, {job.cohort.clients} clients, digest {short(job.digest().hex())}"


def check_updates(job: Job) -> Check:
    """What the server sees of the updates that clients hand in."""
    if (reason := why_off(job)) is None:
        sees = "not even their sum" if job.aggregation.group_key is not None else "their sum alone"
        return ok("updates", f"masked ({job.secure}): the server sees {sees}")
    if not job.handed_in:
        return ok("updates", reason)
    return warn("updates", reason, "three clients or more, and aggregation.secure=null or secagg, hide them in a sum")


def short(digest: str) -> str:
    return f"{digest[:SHOWN_DIGITS]}..."


def check_invited_job(job: Job, path: Path, invitation: Invitation) -> Check:
    """A site's copy of the job file is the one that the invitation names, setting for setting."""
    if job.digest() == invitation.job_digest:
        return ok("job file", f"{path} is the invitation's")
    return fail(
        "job file",
        f"{path} has digest {short(job.digest().hex())}, the invitation names {short(invitation.job)}",
        "ask the operator for the job file as it was when invited, or for a new invitation",
    )


def check_invite_for_server(path: Path, job: Job, identity: Identity, now: datetime) -> Check:
    """An invitation as its operator sees it: valid, for this server's key and this job."""
    name = f"invitation {path.name}"
    try:
        invitation = load_invitation(path, now)
    except FlglmError as error:
        return fail(name, error.message, error.hint or "write a new one: flglm invite")
    if invitation.server_public != identity.public:
        return fail(name, f"names another server key than {identity.name}'s", "write a new one: flglm invite --server")
    if job.digest() != invitation.job_digest:
        return fail(
            name,
            f"names job {short(invitation.job)}, the job file has digest {short(job.digest().hex())}",
            "use the job file as it was when invited, or write new invitations: flglm invite",
        )
    return ok(name, f"of {invitation.client}, for this key and this job")
