"""How the files that people hold are written and read: JSON with a `version`, nothing overwritten, nothing shown.

What is corrupt, incomplete or of another version raises KeyFileError, which names the file and never shows what a
private key file holds.
"""

import os
import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import KeyFileError

MAX_FILE_BYTES = 64 * 1024

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1


File = TypeVar("File", bound=KeyFile)


def parse(path: Path, schema: type[File], *, private: bool = False) -> File:
    """Read a file; a private one only if nobody but its owner can reach it. Raises KeyFileError."""
    try:
        return schema.model_validate_json(_read(path, private=private))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeyFileError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def create(path: Path, content: str, *, mode: int) -> None:
    """Write a new file, which nobody can see half written or, under any name, with other permissions than `mode`."""
    _make_folder(path.parent)
    try:
        descriptor, draft = tempfile.mkstemp(prefix=".", suffix=".draft", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(content + "\n")
                file.flush()
                os.fsync(descriptor)
            os.chmod(draft, mode)
            # A link, unlike a rename, replaces nothing.
            os.link(draft, path)
        finally:
            os.unlink(draft)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already: choose another name or folder") from None
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Raises KeyFileError."""
    try:
        path.unlink()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def _read(path: Path, *, private: bool) -> bytes:
    try:
        with path.open("rb") as file:
            if private and os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyFileError(f"{path} is open to others: type chmod 600 {shlex.quote(str(path))}")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is too long for such a file: more than {MAX_FILE_BYTES} bytes")
    return content


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"{directory}: {error.strerror}") from None
