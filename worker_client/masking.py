"""A client's part in a round's masked sum: who may be in it, what is masked, and what it does not do twice.

The server only names the members. The client holds them against what it knows: itself with its own key, no name that
has changed its key within the job, no fewer than the job allows, and, where its owner keeps a roster, nobody else.
Everything else in the terms follows from the job.

Two sums of one round's updates among different members differ by an update. So what a client once helped to unmask is
kept on disk, flushed before its shares leave, and no other sum of that round is helped with. In a ring
(worker_client/ring.py) it learns that a sum was seen when it is told what came of it.

Under a group's key one client is asked last to open the sum for all (worker_client/group.py).
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shared import state_files
from shared.errors import CheckpointError, Refused, SchemaError, ShareError
from shared.flat import Shapes
from shared.identity import Identity
from shared.job import Job
from shared.job.secure import server_quorum
from shared.masked_updates import flat_difference, ring_terms_of, terms_of
from shared.payload.messages import Objection, SumOf
from shared.secure_aggregation.checks import ascending
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.messages import KeyList, RelayedShares, UnmaskRequest
from shared.secure_aggregation.terms import Member, RingTerms, SumTerms, Terms
from worker_client.group import Group
from worker_client.remote_trunk import Boundary, GroupWords, RemoteTrunk
from worker_client.ring import RingPlace
from worker_client.steps import Report

MEMBERS = "members.json"
SUMS = "sums.jsonl"

# Names by public key (32 bytes): the cards that a client's owner holds of all clients of the job.
Roster = Callable[[], Mapping[bytes, str]]


@dataclass
class MaskedUpdates:
    """Hands in a client's updates so that the server sees their sum alone. `folder`: what must outlive the process."""

    job: Job
    identity: Identity
    shapes: Shapes
    folder: Path
    report: Report
    roster: Roster | None = None
    group: Group | None = None
    known: dict[str, str] = field(init=False)
    """Public keys of all members so far, in hexadecimal, by name."""
    shown: str = field(init=False, default="")
    place: RingPlace | None = field(init=False, default=None)
    """In the ring of this session, where updates are masked by one."""

    def __post_init__(self) -> None:
        path = self.folder / MEMBERS
        self.known = dict(state_files.read_json(path)) if path.exists() else {}

    def terms(self, boundary: Boundary) -> SumTerms | None:
        """The terms of the sum that this round ends with; None if updates are not masked in this job.

        Raises Refused where the server names members that must not be, or would have the update in the clear.
        """
        if self.job.secure == "off":
            if boundary.sum is not None:
                raise SchemaError("the server would mask updates; the job says aggregation.secure=off")
            return None
        if boundary.sum is None or boundary.round is None:
            raise _refused(f"it asks for this client's update in the clear; the job says {self.job.secure}")
        if self.job.secure == "ring":
            return self._ring_terms(boundary.sum)
        if boundary.sum.ring is not None:
            raise SchemaError(f"the server would sum in a ring; the job says aggregation.secure={self.job.secure}")
        self._check(boundary.sum.members)
        return terms_of(self.job, self.shapes, boundary.sum.members, boundary.round, boundary.sum.nonce)

    def hand_in(
        self,
        trunk: RemoteTrunk,
        terms: SumTerms,
        round: int,
        weight: int,
        start: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> Boundary:
        """What became of `start` in `round`, weighted; what the server says when the sum is there.

        An update that is not finite stays here: in its place nothing changed, with the smallest weight, so that the
        others have their sum. Raises Refused, what the library raises for a server that breaks the protocol, and
        CheckpointError if the disk refuses.
        """
        vector, withheld = flat_difference(start, values), None
        weight = max(1, min(weight, terms.max_weight))
        if not np.isfinite(vector).all():
            withheld = "it has values that are NaN or infinite, and stayed here"
            vector, weight = np.zeros_like(vector), 1
        if clipped := terms.encoding.clipped(vector):
            self.report({"event": "update_clipped", "round": round, "values": clipped, "to": terms.encoding.clip})
        told = weight if self.job.cohort.adapters == "per_client" else 0
        if isinstance(terms, Terms):
            boundary = self._in_phases(trunk, terms, round, told, (vector, weight), start)
        else:
            assert self.place is not None
            boundary = self.place.hand_in(trunk, round, told, (vector, weight), partial(self._refuse_other, round))
            _append(self.folder / SUMS, {"round": round, "clients": self.place.summed()})
        return replace(boundary, refused=withheld) if withheld and boundary.refused is None else boundary

    def _ring_terms(self, announced: SumOf) -> RingTerms:
        """Those of the ring that the round's sum is made in: a new one, or the one that this client has a place in."""
        if announced.ring is None:
            self._check(announced.members)
            terms = ring_terms_of(self.job, self.shapes, announced.members, announced.nonce)
            self.place = RingPlace(terms, announced.nonce, self.identity)
            return terms
        place = self.place
        if place is None or (place.nonce, place.terms.members) != (announced.nonce, announced.members):
            raise SchemaError("the server would sum in a ring that this client has no place in")
        self._check([announced.members[number] for number in ascending(announced.ring.members, place.terms)])
        place.asked = announced.ring
        return place.terms

    def _in_phases(
        self,
        trunk: RemoteTrunk,
        terms: Terms,
        round: int,
        told: int,
        update: tuple[Floats, int],
        start: Mapping[str, Tensor],
    ) -> Boundary:
        client = Client(terms, self.identity, group=None if self.group is None else self.group.key)
        boundary = self._phases(trunk, client, terms, round, told, update)
        if not isinstance(boundary, GroupWords):
            return boundary
        assert self.group is not None
        body, frames = self.group.open_sum(client, boundary, terms, round, start, self.report)
        last = trunk.mask(round, body, Boundary, frames)
        assert isinstance(last, Boundary)
        return last

    def _phases(
        self, trunk: RemoteTrunk, client: Client, terms: Terms, round: int, told: int, update: tuple[Floats, int]
    ) -> Boundary | GroupWords:
        """Whoever is left out of the sum is told so, with the next round's beginning, in place of a phase's answer.

        Under a group's key it may end with a sum to open.
        """
        keys = trunk.mask(round, client.advertise_keys(), KeyList, weight=told)
        if isinstance(keys, Boundary):
            return keys
        relayed = trunk.mask(round, client.share_keys(keys), RelayedShares)
        if isinstance(relayed, Boundary):
            return relayed
        try:
            message, words = client.mask_input(relayed, *update)
        except ShareError as error:
            return self._object(trunk, terms, round, error)
        request = trunk.mask(round, message, UnmaskRequest, [words.data])
        if isinstance(request, Boundary):
            return request
        self._settle(round, [terms.name(number) for number in client.in_sum(request)])
        return trunk.mask(round, client.unmask(request), Boundary if self.group is None else GroupWords)

    def _object(self, trunk: RemoteTrunk, terms: Terms, round: int, error: ShareError) -> Boundary:
        self.report({"event": "shares_refused", "round": round, "reason": error.message})
        number = next(n for n, member in enumerate(terms.members) if member.name in error.clients)
        return trunk.mask(round, Objection(client=number), Boundary)

    def _check(self, members: Sequence[Member]) -> None:
        names = {member.name: member.public_key for member in members}
        if names.get(self.identity.name, self.identity.public.hex()) != self.identity.public.hex() or (
            self.identity.public.hex() not in names.values()
        ):
            raise _refused("this client is not among the members of its round with its own key")
        if len(members) < server_quorum(self.job):
            raise _refused(f"a round of {len(members)} members; {server_quorum(self.job)} are due (cohort.quorum)")
        for name, key in names.items():
            if self.known.get(name, key) != key:
                raise _refused(f"{name} has another key than in an earlier round")
        if self.roster is not None:
            roster = self.roster()
            for member in members:
                if roster.get(member.public) != member.name:
                    raise _refused(f"{member.name} with key {member.public_key[:16]}... is not in this site's roster")
        if not names.items() <= self.known.items():
            self.known |= names
            state_files.write_json(self.folder / MEMBERS, self.known)
        if (shown := fingerprint(members)) != self.shown:
            self.shown = shown
            event = {"event": "members", "names": sorted(names), "fingerprint": shown}
            self.report(event | {"roster": self.roster is not None})

    def _settle(self, round: int, summed: Sequence[str]) -> None:
        """Keep whose sum of `round` this client helps to unmask. Raises Refused if it helped with another."""
        self._refuse_other(round, summed)
        _append(self.folder / SUMS, {"round": round, "clients": list(summed)})

    def _refuse_other(self, round: int, summed: Sequence[str]) -> None:
        """Raises Refused if another sum of `round` than this was seen with this client's help."""
        for kept in _lines(self.folder / SUMS):
            if kept["round"] == round and kept["clients"] != list(summed):
                other = sorted(set(kept["clients"]) ^ set(summed))
                raise Refused(
                    f"round {round}: this client helped to unmask a sum of this round that {', '.join(other)} "
                    f"{'was' if len(other) == 1 else 'were'} differently in; together the two would give updates away",
                    reason="another_sum",
                    hint="bring back the clients that were in it: the round is done again among the same",
                )


def fingerprint(members: Sequence[Member]) -> str:
    """For people to compare: 150 bits of the SHA-256 of names and keys, in base32, 6 groups of 5."""
    text = "".join(f"{member.name} {member.public_key}\n" for member in members)
    letters = base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()
    return "-".join(letters[start : start + 5] for start in range(0, 30, 5))


def _lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines: one that a kill cut short was not yet acted upon."""
    if not path.exists():
        return []
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None


def _append(path: Path, document: dict[str, object]) -> None:
    """Flushed to disk. Raises CheckpointError if the disk refuses."""
    with state_files.writing(path):
        whole = path.read_bytes() if path.exists() else b""
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(whole.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(document).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _refused(reason: str) -> Refused:
    return Refused(
        f"this client hands nothing in to the server: {reason}",
        reason="masking",
        hint="compare the roster's fingerprint with the other clients, and ask the operator",
    )
