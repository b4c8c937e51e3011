"""What a task asks: cases as its files hold them, put by a template into a prompt and options to choose from."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One decision. `fields`: texts for the template. `gold`: the names of the right options, one of which suffices.

    `candidates`: the names of the options, where each case has its own. `group`: which cases are one question.
    """

    fields: Mapping[str, str]
    gold: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Template:
    """`prompt`, and for each option's name how it goes on; one text for all where the candidates are the case's own,
    with {name} for the candidate. Curly braces stand for the case's fields.
    """

    prompt: str
    options: Mapping[str, str] | str


@dataclass(frozen=True)
class Example:
    """A prompt, and by name how it may go on. The order is that of the template or the candidates."""

    prompt: str
    options: Mapping[str, str]
    gold: tuple[str, ...]
    group: str = ""

    @property
    def chance(self) -> float:
        """How often a blind choice is right."""
        return sum(name in self.gold for name in self.options) / len(self.options)


@dataclass(frozen=True)
class Answer:
    """What was chosen, and what is right."""

    chosen: str
    gold: tuple[str, ...] = field(default=())
    group: str = ""

    @property
    def right(self) -> bool:
        return self.chosen in self.gold


def render(template: Template, case: Case) -> Example:
    """Texts of the case are put in as they are, braces too."""
    options = template.options
    if isinstance(options, str):
        options = {name: options.format(name=name, **case.fields) for name in case.candidates}
    else:
        options = {name: text.format(**case.fields) for name, text in options.items()}
    return Example(template.prompt.format(**case.fields), options, case.gold, case.group)
