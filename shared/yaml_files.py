"""Settings that people write in YAML: read with bounds, every fault one line that names the setting."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from shared.errors import JobError

# A file of settings has a few kilobytes, and YAML takes a second to read for each 64.
MAX_FILE_BYTES = 2**16
# Merge keys repeat what they name, and what that repeats: ten aliases 36 times, a hundred more than memory holds.
MAX_ALIASES = 10
MAX_DEPTH = 20

Model = TypeVar("Model", bound=BaseModel)

_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A file's settings, not yet checked. `what` it is, such as "job file". Raises JobError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}", hint=f"name the {what}") from None
    if len(content) > MAX_FILE_BYTES:
        raise JobError(f"{path}: more than {MAX_FILE_BYTES} bytes are no {what}")
    try:
        text = content.decode()
        _check_tokens(text, path, what)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise JobError(f"{path}: not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise JobError(f"{path}: a {what} is a mapping of settings")
    return values


def _check_tokens(text: str, path: Path, what: str) -> None:
    """Raises JobError before anything is built if `text` nests or repeats too much, or says how to build something."""
    aliases = depth = 0
    for token in yaml.scan(text):
        aliases += isinstance(token, yaml.AliasToken)
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise JobError(f"{path}: nested too deeply for a {what}")
        if aliases > MAX_ALIASES:
            raise JobError(f"{path}: more than {MAX_ALIASES} aliases are no {what}")
        if isinstance(token, yaml.TagToken):
            raise JobError(f"{path}: a {what} has no tags; quote what begins with '!'")


def validated(values: Any, model: type[Model], source: str) -> Model:
    """Raises JobError: one line, with the setting's name and, for unknown ones, the nearest."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise JobError(f"{source}: {describe(error, model)}") from None
    except RecursionError:
        raise JobError(f"{source}: nested too deeply") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One fault of a validation error in one line, an unknown setting first, with the nearest known one."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    where = ".".join(str(part) for part in fault["loc"]) or "settings"
    if fault["type"] == "extra_forbidden":
        unknown = str(fault["loc"][-1])
        near = difflib.get_close_matches(unknown, _known_names(model), n=1, cutoff=0.5)
        return f"unknown setting '{where}'" + (f"; did you mean '{near[0]}'?" if near else "")
    return f"{where}: {fault['msg']}"


def _known_names(model: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        inner = field.annotation
        for candidate in getattr(inner, "__args__", (inner,)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                names.extend(_known_names(candidate))
    return names
