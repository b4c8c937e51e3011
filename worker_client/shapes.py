"""The shapes that rows of training data have, told apart by their keys, and what each says: a text, a prompt with its
completion, or a conversation. A new shape is a row of the table.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from shared.errors import DataError


@dataclass(frozen=True)
class Plain:
    """All of it is learnt."""

    text: str


@dataclass(frozen=True)
class Pair:
    """The completion is learnt, and that it ends."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """What the assistant says is learnt. Messages have at least "role" and "content", both text."""

    messages: list[dict[str, Any]]


Content = Plain | Pair | Chat


@dataclass(frozen=True)
class Shape:
    """`keys`: those that a row must have; others are passed over. `read` may raise DataError."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[dict[str, Any]], Content]

    def __str__(self) -> str:
        return "{" + ", ".join(f'"{key}"' for key in self.keys) + "}"


def recognise(record: dict[str, Any]) -> Shape:
    """The first shape of the table whose keys are all there. Raises DataError, which names the nearest one."""
    for shape in SHAPES:
        if all(key in record for key in shape.keys):
            return shape
    raise DataError(
        f"keys {sorted(record)[:6]}; expected {_nearest(record)}",
        hint="the shapes are " + ", ".join(str(shape) for shape in SHAPES),
    )


# Reading


def _messages(record: dict[str, Any]) -> Chat:
    messages = record["messages"]
    if not _turns(messages, "role", "content"):
        raise DataError('"messages" must be a list of {"role", "content"} with text in both')
    if messages[0]["role"] == "assistant":
        raise DataError("the assistant speaks first, and answers nobody", hint="begin with a message of another role")
    return Chat(messages)


# Who speaks in ShareGPT's conversations, in the words of chat templates.
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _sharegpt(record: dict[str, Any]) -> Chat:
    turns = record["conversations"]
    if not _turns(turns, "from", "value"):
        raise DataError('"conversations" must be a list of {"from", "value"} with text in both')
    for turn in turns:
        if turn["from"] not in _ROLES:
            raise DataError(f'"from" is {turn["from"]!r}; known are {", ".join(_ROLES)}')
    return _messages({"messages": [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]})


def _turns(turns: Any, who: str, what: str) -> bool:
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(t, dict) and isinstance(t.get(who), str) and isinstance(t.get(what), str) for t in turns)
    )


# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, README, "Data Release").
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def _alpaca(record: dict[str, Any]) -> Pair:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    if record.get("input") in (None, ""):
        return Pair(_ALPACA.format(instruction=instruction), output)
    return Pair(_ALPACA_WITH_INPUT.format(instruction=instruction, input=_text(record, "input")), output)


def _pair(record: dict[str, Any]) -> Pair:
    return Pair(_text(record, "prompt"), _text(record, "completion"))


def _plain(record: dict[str, Any]) -> Plain:
    return Plain(_text(record, "text"))


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f'"{key}" must be text, not {type(value).__name__}')
    return value


SHAPES = (
    Shape("messages", ("messages",), _messages),
    Shape("prompt/completion", ("prompt", "completion"), _pair),
    Shape("alpaca", ("instruction", "output"), _alpaca),
    Shape("sharegpt", ("conversations",), _sharegpt),
    Shape("text", ("text",), _plain),
)

# Help for those who brought another shape

# What other data sets call these keys.
_OTHER_NAMES = {
    "prompt": ("question", "query", "input", "source"),
    "completion": ("answer", "response", "output", "target"),
    "messages": ("chat", "dialog", "dialogue"),
    "text": ("content", "body", "document"),
}
_ALIKE = 0.75


def _nearest(keys: Iterable[str]) -> str:
    """The shape most of whose keys are there under the same, a similar or another usual name, and what to change."""
    present = list(keys)
    meant = {shape.name: {key: _meant(key, present) for key in shape.keys} for shape in SHAPES}

    def share(shape: Shape) -> float:
        found = meant[shape.name]
        return sum(1.0 if key in present else 0.75 if found[key] else 0.0 for key in shape.keys) / len(shape.keys)

    best = max(SHAPES, key=share)
    if share(best) == 0:
        return "one of " + ", ".join(str(shape) for shape in SHAPES)
    missing = [
        f'"{key}" is missing' + (f' (is it "{name}"?)' if name else "")
        for key, name in meant[best.name].items()
        if key not in present
    ]
    return f"{best}, the nearest shape: {', '.join(missing)}"


def _meant(key: str, present: list[str]) -> str | None:
    alike = [name for name in present if SequenceMatcher(None, key, name.lower()).ratio() >= _ALIKE]
    usual = [name for name in present if name.lower() in _OTHER_NAMES.get(key, ())]
    return next(iter(alike + usual), None)
