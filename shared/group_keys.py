"""The key of a group of data owners (aggregation.group_key): its file, its fingerprint, and whether it is the job's.

    <any name>   32 random bytes, which one of the owners makes and the others get from him, never through the server

The job names the key by its fingerprint, so that every site sees by itself, before anything of it is used, that it has
the one that the others have. The fingerprint tells nothing else of the key.
"""

import base64
import json
import os
from pathlib import Path

from pydantic import SecretStr

from shared.errors import JobError, KeyFileError
from shared.job import Job
from shared.key_files import KeyFile, create, parse
from shared.secure_aggregation import keys
from shared.secure_aggregation.group_key import GroupKey

SEED_BYTES = 32


class _GroupKeyFile(KeyFile):
    group_key: SecretStr


def create_group_key(path: Path) -> GroupKey:
    """A new key, written to `path` (mode 0600). Overwrites nothing. Raises KeyFileError."""
    key = GroupKey(os.urandom(SEED_BYTES))
    create(path, json.dumps({"version": 1, "group_key": key.seed.hex()}, indent=1), mode=0o600)
    return key


def load_group_key(path: Path) -> GroupKey:
    """Raises KeyFileError, also if anyone but its owner may read or write it."""
    try:
        seed = bytes.fromhex(parse(path, _GroupKeyFile, private=True).group_key.get_secret_value())
    except ValueError:
        seed = b""
    if len(seed) != SEED_BYTES:
        raise KeyFileError(f"{path}: group_key: 64 hexadecimal digits are due")
    return GroupKey(seed)


def fingerprint(key: GroupKey) -> str:
    """For people to compare, and for the job: 150 bits of HKDF-SHA256 of the key, in base32, 6 groups of 5."""
    letters = base64.b32encode(keys.derive(key.seed, "group fingerprint", bytes(32))).decode()
    return "-".join(letters[start : start + 5] for start in range(0, 30, 5))


def group_key_for(job: Job, path: Path | None) -> GroupKey | None:
    """The key in `path`, which must be the job's; None if the job has none.

    Raises JobError if there should be a file or should not, KeyFileError for one that is not the job's.
    """
    due = job.aggregation.group_key
    if path is None:
        if due is not None:
            raise JobError(
                f"the job keeps sums from the server (aggregation.group_key={due}), and --group-key is missing",
                hint="get the file from another data owner of the job, not from the server, and name it: --group-key",
            )
        return None
    if due is None:
        raise JobError(
            f"--group-key {path}, and the job has no aggregation.group_key: its server would see sums and averages",
            hint="ask the operator for a job with aggregation.group_key, or leave --group-key out",
        )
    key = load_group_key(path)
    if (mine := fingerprint(key)) != due:
        raise KeyFileError(
            f"{path} is another group's key: its fingerprint is {mine}, the job says aggregation.group_key={due}",
            hint="compare fingerprints with the other data owners, and get the file from one of them",
        )
    return key
