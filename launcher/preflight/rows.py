"""The private rows: whether they load, how many there are, how many the job would cut."""

from pathlib import Path

from launcher.preflight.checks import Check, fail, ok, warn
from shared.errors import JobError, ModelError, UsageError
from shared.job import Job
from shared.model.checkpoint import Checkpoint
from shared.model.families import context_length
from shared.model.methods import longest_row
from worker_client.client import load_tokenizer
from worker_client.data import LoadedRows, Row, load_rows, split_validation
from worker_client.record_files import read_records

MEND = "mend the line that is named; README.md, 'Rows', shows the shapes"
# More than this share of cut or skipped rows is worth a look.
MANY = 0.1


def check_parsed(path: Path) -> Check:
    """The file has records; without the job and its model nothing more can be said."""
    try:
        count = sum(1 for _ in read_records(path))
    except UsageError as error:
        return fail(f"rows {path.name}", error.message, error.hint or MEND)
    if count == 0:
        return fail(f"rows {path.name}", f"{path}: no row", "name the file with --data")
    return ok(f"rows {path.name}", f"{count} rows, not tokenized yet")


def check_rows(
    data: Path, validation: Path | None, fraction: float, job: Job, checkpoint: Checkpoint
) -> tuple[list[Check], tuple[Row, ...]]:
    """Tokenized as training would: a check for each file, or one for a tokenizer that is not there; and what is held
    out, as far as that is known.
    """
    try:
        tokenizer = load_tokenizer(checkpoint)
    except ModelError as error:
        mend = error.hint or "copy the tokenizer's files into the model's folder"
        return [fail("tokenizer", error.message, mend)], ()
    try:
        limit = longest_row(job, context_length(checkpoint.config))
    except JobError as error:
        return [fail("method", error.message, error.hint or "ask for a job with fewer virtual tokens")], ()
    checks: list[Check] = []
    held_out: tuple[Row, ...] = ()
    for path in (data, validation):
        if path is None:
            continue
        try:
            loaded = load_rows(path, tokenizer, max_length=limit, too_long=job.data.too_long)
            if path == validation:
                held_out = loaded.rows
            elif validation is None and fraction > 0:
                _, held_out = split_validation(loaded.rows, fraction, job.training.seed)
        except UsageError as error:
            checks.append(fail(f"rows {path.name}", error.message, error.hint or MEND))
        else:
            checks.append(_counted(path, loaded, limit))
    return checks, held_out


def _counted(path: Path, loaded: LoadedRows, limit: int) -> Check:
    lost = {
        f"cut at {limit} tokens": loaded.truncated,
        f"longer than {limit} tokens left out": loaded.skipped_long,
        "without a token that counts left out": loaded.without_target,
    }
    found = ", ".join([f"{len(loaded.rows)} usable", *(f"{count} {what}" for what, count in lost.items() if count)])
    total = len(loaded.rows) + loaded.skipped_long + loaded.without_target
    if sum(lost.values()) > MANY * total:
        return warn(f"rows {path.name}", found, "shorten the rows, or ask for a job with a larger data.max_length")
    return ok(f"rows {path.name}", found)
