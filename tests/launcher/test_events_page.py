"""docs/events.md names every event that client, server and broker emit, with its fields, and no other."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Events = dict[str, set[str]]
# By role: where its events come from. Clients and servers share the connection to a broker.
SOURCES = {
    "Client": ("worker_client", "shared"),
    "Server": ("worker_server", "shared"),
    "Broker": ("broker",),
}
# It writes the lines of all logs, and has no event of its own.
FORMATTER = ROOT / "shared" / "logs.py"
ANY = "**"


def trees(folders: tuple[str, ...]) -> Iterator[ast.AST]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != FORMATTER:
                yield ast.parse(path.read_text())


def text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def logged(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """Of each `event(logger, name, field=…)`: name and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "event":
            name = text(node.args[1])
            assert name is not None, ast.unparse(node)
            yield name, {keyword.arg or ANY for keyword in node.keywords} - {"level"}


def reported(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """Of each `{"event": name, field: …}`: name and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [None if key is None else text(key) for key in node.keys]
            if "event" in keys:
                name = text(node.values[keys.index("event")])
                assert name is not None, ast.unparse(node)
                yield name, {key or ANY for key in keys} - {"event"}


@cache
def emitted(role: str) -> Events:
    found: Events = defaultdict(set)
    for tree in trees(SOURCES[role]):
        for name, fields in [*logged(tree), *reported(tree)]:
            found[name] |= fields
    for name, fields in said_by_the_command(role):
        found[name] |= fields
    return found


def said_by_the_command(role: str) -> Iterator[tuple[str, set[str]]]:
    """What launcher/roles.py prints itself, in the function of that role's command."""
    names = {"Client": "client_train", "Server": "server", "Broker": "broker"}
    for node in ast.parse((ROOT / "launcher" / "roles.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == names[role]:
            yield from reported(node)


def documented(role: str) -> Events:
    """The rows of the tables in the role's section: the event, and the fields named beside it."""
    page = (ROOT / "docs" / "events.md").read_text()
    section = page.split(f"\n## {role}\n")[1].split("\n## ")[0]
    found: Events = {}
    fields_at = 0
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "event":
            fields_at = cells.index("fields")
        elif name := re.fullmatch(r"`(\w+)`", cells[0]):
            assert name[1] not in found, f"{name[1]} twice"
            found[name[1]] = set(re.findall(r"`([\w/]+)`", cells[fields_at]))
    return found


@pytest.mark.parametrize("role", SOURCES)
def test_every_event_is_documented_and_no_other(role: str) -> None:
    code, page = emitted(role), documented(role)
    assert len(code) > 4
    assert code.keys() - page.keys() == set()
    assert page.keys() - code.keys() == set()


@pytest.mark.parametrize("role", SOURCES)
def test_every_field_that_the_code_names_is_documented(role: str) -> None:
    code, page = emitted(role), documented(role)
    missing = {name: fields - page[name] - {ANY} for name, fields in code.items()}
    assert {name: fields for name, fields in missing.items() if fields} == {}


@pytest.mark.parametrize("role", ["Server"])
def test_no_field_is_documented_that_a_log_does_not_have(role: str) -> None:
    code, page = emitted(role), documented(role)
    strange = {name: fields - code[name] for name, fields in page.items() if ANY not in code[name]}
    assert {name: fields for name, fields in strange.items() if fields} == {}


def test_a_round_is_a_number_and_rounds_a_count() -> None:
    """Nothing that says how much is complete is called by the word for which one it is."""
    counts = {"evaluation", "resumed", "finished", "server_ready", "checkpoint_written", "job_finished"}
    for role in SOURCES:
        for name, fields in emitted(role).items():
            if name in counts:
                assert "rounds" in fields
                assert "round" not in fields, name
