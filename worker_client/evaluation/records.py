"""Values out of records of task files; what is missing or of another kind raises DataError."""

from typing import Any

from shared.errors import DataError


def text_in(record: dict[str, Any], key: str) -> str:
    text: str = _of_kind(record, key, str, "text")
    return text


def list_in(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects."""
    values: list[Any] = _of_kind(record, key, list, "a list")
    if not all(isinstance(value, dict) for value in values):
        raise DataError(f'"{key}" must be a list of objects')
    return values


def object_in(record: dict[str, Any], key: str) -> dict[str, Any]:
    value: dict[str, Any] = _of_kind(record, key, dict, "an object")
    return value


def number_in(record: dict[str, Any], key: str) -> int:
    number: int = _of_kind(record, key, int, "a whole number")
    return number


def label_in(record: dict[str, Any], names: dict[Any, str]) -> str:
    """The name of what stands under "label"."""
    if "label" not in record:
        raise DataError('no "label": what is right must be known', hint="take the validation file, not the test file")
    value = record["label"]
    if not isinstance(value, str | int) or value not in names:
        raise DataError(f'"label" is {value!r}; expected {" or ".join(repr(name) for name in names)}')
    return names[value]


def _of_kind(record: dict[str, Any], key: str, kind: type, name: str) -> Any:
    if key not in record:
        raise DataError(f'no "{key}"; there are {", ".join(sorted(record)[:10]) or "none"}')
    if not isinstance(record[key], kind):
        raise DataError(f'"{key}" must be {name}, not {type(record[key]).__name__}')
    return record[key]
