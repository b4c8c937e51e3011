"""What a fuzzing target is: a parser, and the errors that it promises for what it does not take."""

import functools
from collections.abc import Callable

from shared.errors import FlglmError

Target = Callable[[bytes], bool]
TARGETS: dict[str, Target] = {}


def target(*promised: type[FlglmError]) -> Callable[[Callable[[bytes], None]], Target]:
    """A parser that may raise `promised`, as a target of its name."""

    def made(parser: Callable[[bytes], None]) -> Target:
        @functools.wraps(parser)
        def run(data: bytes) -> bool:
            try:
                parser(data)
            except promised as error:
                return _refused(error)
            return True

        TARGETS[parser.__name__] = run
        return run

    return made


def _refused(error: FlglmError) -> bool:
    assert error.message.isprintable()
    return False
