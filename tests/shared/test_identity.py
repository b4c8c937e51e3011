"""The files that people hold: what is written, what is refused, and how admitting and revoking take effect."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.allow_list import AllowList, revoke
from shared.allow_list import admit as admit_at
from shared.errors import KeyFileError
from shared.identity import Card, create_identity, fingerprint, key_digest, load_card, load_identity
from shared.invitations import Invitation, load_invitation, write_invitation
from shared.key_files import MAX_FILE_BYTES
from shared.wire.curve import Door

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PUBLIC = bytes(range(32))
LINK = bytes(range(32, 64))


def invitation(**changes: Any) -> Invitation:
    fields: dict[str, Any] = {
        "id": "0f" * 16,
        "client": "alice",
        "brokers": [{"address": "tcp://broker.example.org:7000", "key": LINK.hex()}, {"address": "tcp://[::1]:7000"}],
        "server": "trunk",
        "server_public_key": PUBLIC.hex(),
        "job": bytes(32).hex(),
        "expires_at": NOW + timedelta(days=1),
    }
    return Invitation(**(fields | changes))


def edit(path: Path, **changes: Any) -> Path:
    """Change fields of a JSON file in place; None drops one."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))
    return path


def admit(card: Path, folder: Path) -> Card:
    return admit_at(card, folder, NOW)


def name_of(admitted: AllowList, public: bytes) -> str | None:
    return admitted.names().get(public)


def card_in(folder: Path, name: str, invitation: str | None = None) -> Path:
    create_identity(folder / f"home of {name}", name, invitation)
    return folder / f"home of {name}" / f"{name}.card"


def test_an_identity_can_be_read_again(tmp_path: Path) -> None:
    made = create_identity(tmp_path / "keys", "alice")
    read = load_identity(tmp_path / "keys" / "alice.key")
    assert (read.name, read.public) == ("alice", made.public)
    peer = X25519PrivateKey.generate().public_key()
    assert read.private.exchange(peer) == made.private.exchange(peer)
    assert read.public == made.private.public_key().public_bytes_raw()
    assert load_card(tmp_path / "keys" / "alice.card") == Card(
        name="alice",
        public_key=made.public.hex(),
        link_key=made.link.public.hex(),
        fingerprint=fingerprint(made.public, made.link.public),
    )
    assert read.link == made.link
    assert len({made.public, made.link.public, made.link.secret, made.private.private_bytes_raw()}) == 4


def test_only_the_owner_can_read_a_key_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_identity(tmp_path, "alice")
    finally:
        os.umask(before)
    assert (tmp_path / "alice.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "alice.card").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice.card", "alice.key"]


def test_the_card_does_not_hold_the_private_key(tmp_path: Path) -> None:
    identity = create_identity(tmp_path, "alice")
    secret = identity.private.private_bytes_raw().hex()
    assert secret in (tmp_path / "alice.key").read_text()
    assert secret not in (tmp_path / "alice.card").read_text()
    assert secret not in repr(identity)


@pytest.mark.parametrize("present", ["alice.key", "alice.card"])
def test_nothing_is_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("mine")
    with pytest.raises(KeyFileError, match=f"{present} exists already"):
        create_identity(tmp_path, "alice")
    assert (tmp_path / present).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [present]


@pytest.mark.parametrize("name", ["", "Alice", "../alice", "a/b", ".alice", "a" * 65, "a b"])
def test_names_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="is no name"):
        create_identity(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "my keys"
    create_identity(folder, "alice")
    path = folder / "alice.key"
    path.chmod(mode)
    with pytest.raises(KeyFileError) as caught:
        load_identity(path)
    assert f"chmod 600 '{path}'" in caught.value.message
    path.chmod(0o600)
    assert load_identity(path).name == "alice"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"version": 2}, "version"),
        ({"name": "Alice"}, "name"),
        ({"name": None}, "name: Field required"),
        ({"extra": 1}, "extra"),
        ({"private_key": "00" * 31}, "64 hexadecimal"),
        ({"private_key": "secret" * 8}, "64 hexadecimal"),
        ({"private_key": 7}, "private_key"),
    ],
)
def test_a_wrong_key_file_gets_one_line_that_names_it(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    secret = create_identity(tmp_path, "alice").private.private_bytes_raw().hex()
    path = edit(tmp_path / "alice.key", **changes)
    with pytest.raises(KeyFileError, match=line) as caught:
        load_identity(path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message
    assert secret not in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}'])
def test_what_is_no_card_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "alice.card"
    path.write_bytes(content)
    with pytest.raises(KeyFileError) as caught:
        load_card(path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message


def test_absent_and_oversized_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "alice.card"
    with pytest.raises(KeyFileError, match=r"alice\.card: No such file"):
        load_card(path)
    path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(KeyFileError, match="too long"):
        load_card(path)
    with pytest.raises(KeyFileError, match="Is a directory"):
        load_card(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="Not a directory"):
        create_identity(tmp_path / "file" / "keys", "alice")


def test_a_card_whose_key_was_exchanged_is_refused(tmp_path: Path) -> None:
    path = edit(card_in(tmp_path, "alice"), public_key=PUBLIC.hex())
    with pytest.raises(KeyFileError, match="fingerprint does not belong"):
        load_card(path)


def test_fingerprints_are_frozen_and_readable() -> None:
    assert fingerprint(PUBLIC, LINK) == "7XVLT-LHTOE-BWFPJ-GLDG4-TIU6R-6OHK7"
    assert len({fingerprint(PUBLIC, LINK), fingerprint(PUBLIC, PUBLIC), fingerprint(LINK, LINK)}) == 3
    assert key_digest(PUBLIC).hex() == "630dcd2966c4336691125448bbb25b4ff412a49c732db2c8abc1b8581bd710dd"


def test_admitting_and_revoking_take_effect_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    alice, bob = card_in(tmp_path, "alice"), card_in(tmp_path, "bob")
    admit(alice, folder)
    admitted = AllowList(folder)
    assert name_of(admitted, load_card(alice).public) == "alice"
    assert name_of(admitted, load_card(bob).public) is None
    assert admit(bob, folder).name == "bob"
    assert name_of(admitted, load_card(bob).public) == "bob"
    revoke("alice", folder)
    assert name_of(admitted, load_card(alice).public) is None
    assert name_of(admitted, load_card(bob).public) == "bob"
    revoke("bob", folder)
    assert name_of(admitted, load_card(bob).public) is None


def test_cards_are_read_again_only_when_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "admitted"
    public = load_card(admitted_card := card_in(tmp_path, "alice")).public
    admit(admitted_card, folder)
    admitted = AllowList(folder)
    assert name_of(admitted, public) == "alice"
    monkeypatch.setattr("shared.allow_list.load_card", lambda path: pytest.fail(f"{path} was read again"))
    assert name_of(admitted, public) == "alice"


def test_a_renewed_card_takes_effect(tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    old, new = card_in(tmp_path / "old", "alice"), card_in(tmp_path / "new", "alice")
    admit(old, folder)
    admitted = AllowList(folder)
    assert name_of(admitted, load_card(old).public) == "alice"
    revoke("alice", folder)
    admit(new, folder)
    assert name_of(admitted, load_card(old).public) is None
    assert name_of(admitted, load_card(new).public) == "alice"


def test_one_name_has_one_key_and_one_key_has_one_name(tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    alice, other_alice = card_in(tmp_path / "1", "alice"), card_in(tmp_path / "2", "alice")
    renamed = tmp_path / "carol.card"
    renamed.write_text(alice.read_text())
    edit(renamed, name="carol")
    admit(alice, folder)
    admit(alice, folder)
    with pytest.raises(KeyFileError, match="another key is admitted as alice: revoke"):
        admit(other_alice, folder)
    with pytest.raises(KeyFileError, match="admitted already, as alice"):
        admit(renamed, folder)
    assert [path.name for path in folder.iterdir()] == ["alice.card"]


@pytest.mark.parametrize("same", ["name", "key"])
def test_an_ambiguous_list_admits_nobody_until_it_is_mended(tmp_path: Path, same: str) -> None:
    folder = tmp_path / "admitted"
    alice = card_in(tmp_path / "1", "alice")
    admit(alice, folder)
    admitted = AllowList(folder)
    public = load_card(alice).public
    assert name_of(admitted, public) == "alice"
    copied = folder / "copied.card"
    copied.write_text((alice if same == "key" else card_in(tmp_path / "2", "alice")).read_text())
    if same == "key":
        edit(copied, name="carol")
    for _ in range(2):
        with pytest.raises(KeyFileError, match="another card too"):
            name_of(admitted, public)
    copied.unlink()
    assert name_of(admitted, public) == "alice"


def test_a_corrupt_card_admits_nobody_until_it_is_mended(tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    alice = card_in(tmp_path, "alice")
    admit(alice, folder)
    admitted = AllowList(folder)
    (folder / "bad.card").write_text("{")
    with pytest.raises(KeyFileError, match=r"bad\.card"):
        name_of(admitted, load_card(alice).public)
    (folder / "bad.card").unlink()
    assert name_of(admitted, load_card(alice).public) == "alice"


def test_revoking_removes_a_card_whatever_its_file_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    folder.mkdir()
    (folder / "from-mail.card").write_text(card_in(tmp_path, "alice").read_text())
    with pytest.raises(KeyFileError, match="nobody is admitted as bob"):
        revoke("bob", folder)
    revoke("alice", folder)
    assert list(folder.iterdir()) == []


def test_an_absent_list_is_an_error_not_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="no folder of cards"):
        AllowList(tmp_path / "absent").cards()
    with pytest.raises(KeyFileError, match="no folder of cards"):
        revoke("alice", tmp_path / "absent")


def test_an_invitation_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "alice.invitation"
    write_invitation(path, invitation(), tmp_path / "clients")
    read = load_invitation(path, NOW)
    assert read == invitation()
    assert read.server_public == PUBLIC
    assert read.job_digest == bytes(32)
    assert [broker.door for broker in read.brokers] == [
        Door("tcp://broker.example.org:7000", LINK),
        Door("tcp://[::1]:7000"),
    ]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyFileError, match="exists already"):
        write_invitation(path, invitation(), tmp_path / "clients")


def test_an_expired_invitation_is_refused_with_its_date(tmp_path: Path) -> None:
    path = tmp_path / "alice.invitation"
    write_invitation(path, invitation(), tmp_path / "clients")
    load_invitation(path, NOW + timedelta(hours=23, minutes=59))
    with pytest.raises(KeyFileError, match="expired at 2030-01-02 00:00 UTC") as caught:
        load_invitation(path, NOW + timedelta(days=1))
    assert caught.value.hint is not None
    assert "new one" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"version": 2}, "version"),
        ({"unknown": "field"}, "unknown: Extra inputs"),
        ({"job": None}, "job: Field required"),
        ({"job": "AB" * 32}, "job"),
        ({"server_public_key": "00" * 31}, "server_public_key"),
        ({"brokers": []}, "brokers"),
        ({"brokers": [{"address": "ipc:///tmp/socket"}] * 17}, "brokers"),
        ({"brokers": [{"address": "http://a:1"}]}, "brokers.0"),
        ({"brokers": [{"address": "tcp://localhost"}]}, "brokers.0"),
        ({"brokers": [{"address": "tcp://127.0.0.1:1", "key": "00"}]}, "brokers.0.key"),
        ({"brokers": [{"address": "tcp://10.0.0.1:1"}]}, "would leave this machine"),
        ({"brokers": [{"address": "tcp://localhost.example:1"}]}, "would leave this machine"),
        ({"client": "../alice"}, "client"),
        ({"expires_at": "2030-01-02T00:00:00"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
    ],
)
def test_a_wrong_invitation_gets_one_line_that_names_it(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    path = tmp_path / "alice.invitation"
    write_invitation(path, invitation(), tmp_path / "clients")
    with pytest.raises(KeyFileError, match=line) as caught:
        load_invitation(edit(path, **changes), NOW)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message


def test_an_invitation_admits_one_card(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    write_invitation(tmp_path / "alice.invite", invitation(), folder)
    first, second = (card_in(tmp_path / number, "alice", "0f" * 16) for number in ("1", "2"))
    admit(first, folder)
    admit(first, folder)
    assert [path.name for path in folder.iterdir()] == ["alice.card"]
    revoke("alice", folder)
    for card in (first, second):
        with pytest.raises(KeyFileError, match="was used already, or is not from here"):
            admit(card, folder)


def test_an_invitation_admits_whom_it_names_until_it_expires(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    write_invitation(tmp_path / "alice.invite", invitation(), folder)
    with pytest.raises(KeyFileError, match="answers the invitation of alice"):
        admit(card_in(tmp_path, "bob", "0f" * 16), folder)
    card = card_in(tmp_path, "alice", "0f" * 16)
    with pytest.raises(KeyFileError, match="the invitation of alice expired at 2030-01-02"):
        admit_at(card, folder, NOW + timedelta(days=1))
    assert admit(card, folder).name == "alice"


def test_a_corrupt_invitation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "alice.invitation"
    path.write_text('{"version": 1,')
    with pytest.raises(KeyFileError, match=r"alice\.invitation: Invalid JSON"):
        load_invitation(path, NOW)
