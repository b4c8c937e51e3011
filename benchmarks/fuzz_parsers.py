"""Coverage-guided fuzzing (atheris) of every parser that faces a socket or a file; the invariants are in fuzz_targets.

Each target runs in a process of its own for `--seconds`, from valid inputs on, with our modules and the YAML parser
instrumented. It ends early at an error that the parser does not promise, at an input that takes longer than ten seconds
or more than 4 GiB. Such findings are printed with the input in hexadecimal, and the exit code is 1. To see one again:
`TARGETS[name](bytes.fromhex(...))`.
"""

import importlib.util
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.reporting import Goal, parser, publish
from shared.errors import UsageError

INSTRUMENTED = ["shared", "worker_client", "launcher", "yaml"]
LIMITS = ("-timeout=10", "-rss_limit_mb=4096", "-max_len=8192", "-print_final_stats=0")
QUICK_SECONDS = 2
GRACE_S = 120.0
DONE = re.compile(r"^Done (\d+) runs", re.MULTILINE)
PROGRESS = re.compile(r"^#(\d+)\s.*?\bcov: (\d+)", re.MULTILINE)
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Finding:
    """An input that a target does not withstand, and what it said."""

    input: str
    said: str


@dataclass(frozen=True)
class Outcome:
    """`cov`: edges of the instrumented modules that were reached. `accepted`: inputs that the parser took."""

    target: str
    runs: int
    cov: int
    accepted: int
    findings: tuple[Finding, ...]


def fuzz(target: str, seconds: int, seed: int) -> Outcome:
    """One target in a process of its own, in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.fuzz_parsers", "--inside", name, "--target", target]
        command += ["--seconds", str(seconds), "--seed", str(seed)]
        settings = {"TMPDIR": name, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | settings,
            timeout=seconds + GRACE_S,
        )
        findings = tuple(Finding(path.read_bytes().hex(), _tail(ran.stdout)) for path in folder.glob("found-*"))
        progress, done = PROGRESS.findall(ran.stdout), DONE.search(ran.stdout)
        if not findings and not done:
            raise RuntimeError(f"{target} ended without a word ({ran.returncode}): {_tail(ran.stdout)}")
        last, cov = progress[-1] if progress else ("0", "0")
        accepted = int.from_bytes((folder / "accepted").read_bytes(), "little")
        return Outcome(target, int(done[1] if done else last), int(cov), accepted, findings)


def inside(target: str, folder: Path, seconds: int, seed: int) -> None:
    """The process of a target. Imports what atheris shall instrument only now. Does not return."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from benchmarks import fuzz_secagg_targets, fuzz_targets  # noqa: F401 - which register theirs
        from benchmarks.fuzz_registry import TARGETS
        from benchmarks.fuzz_seeds import SEEDS
    run, corpus = TARGETS[target], folder / "corpus"
    corpus.mkdir()
    for index, valid in enumerate(SEEDS[target]()):
        (corpus / f"seed-{index}").write_bytes(valid)
    (folder / "accepted").write_bytes(bytes(8))
    with (folder / "accepted").open("r+b") as file:
        accepted = mmap.mmap(file.fileno(), 8)  # libFuzzer ends the process without a word to Python
    count = 0

    def once(data: bytes) -> None:
        nonlocal count
        if run(data):
            count += 1
            accepted[:] = count.to_bytes(8, "little")

    options = [*LIMITS, f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={folder}/found-"]
    atheris.Setup([target, *options, str(corpus)], once)
    atheris.Fuzz()


def require_atheris() -> None:
    """Raises UsageError."""
    if importlib.util.find_spec("atheris") is None:
        raise UsageError("atheris is not installed", hint="pip install -e '.[fuzz]' (Linux)")


def _tail(said: str) -> str:
    """The traceback alone, if there is one."""
    return said[max(0, said.find("=== Uncaught")) :][-4000:]


def _chosen(named: Sequence[str]) -> list[str]:
    from benchmarks.fuzz_seeds import SEEDS

    unknown = sorted(set(named) - set(SEEDS))
    if unknown:
        raise UsageError(f"no target {', '.join(unknown)}", hint=f"there are {', '.join(SEEDS)}")
    return list(named) or list(SEEDS)


def _report(outcomes: Sequence[Outcome], *, as_json: bool) -> int:
    console = Console(stderr=True)
    found = [(outcome.target, finding) for outcome in outcomes for finding in outcome.findings]
    for target, finding in found:
        console.print(f"{target} does not withstand {finding.input}\n{finding.said}", markup=False, highlight=False)
    rows = [[o.target, f"{o.runs:,}", f"{o.cov:,}", f"{o.accepted:,}", str(len(o.findings))] for o in outcomes]
    goals = [Goal("findings", len(found), 0, at_most=True)]
    figures = {"targets": [asdict(outcome) for outcome in outcomes]}
    publish("fuzz_parsers", ["target", "runs", "cov", "accepted", "findings"], rows, figures, goals, as_json=as_json)
    return 1 if found else 0


def main() -> int:
    arguments = parser("fuzz_parsers", __doc__)
    arguments.add_argument("--target", action="append", default=[], metavar="NAME", help="once for each; all if none")
    arguments.add_argument("--seconds", type=int, default=20, help="for each target")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--inside", type=Path, help="the folder of a target's own process")
    given = arguments.parse_args()
    try:
        require_atheris()
        if given.inside is not None:
            inside(given.target[0], given.inside, given.seconds, given.seed)
        seconds = QUICK_SECONDS if given.quick else given.seconds
        outcomes = [fuzz(target, seconds, given.seed) for target in _chosen(given.target)]
    except UsageError as error:
        print(f"fuzz_parsers: {error.message} ({error.hint})", file=sys.stderr)
        return error.exit_code
    return _report(outcomes, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
