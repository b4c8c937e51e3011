"""What a client's `--out` folder holds of what it trained: the result, or while the job runs the newest checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared import state_files
from shared.errors import CheckpointError, TensorError
from shared.job import Job, parse_job
from shared.model.trainable import load_trained
from shared.payload.messages import RESIDUAL
from shared.prefixes import under
from worker_client.client import RESULT, TRAINED
from worker_client.head_tail import HeadTail

HINT = "name the --out folder of 'flglm client train'"


@dataclass(frozen=True)
class ClientState:
    """`tensors` by name in the whole model, and `residual/<module>.weight`, as client.py writes them to `source`."""

    source: Path
    tensors: Mapping[str, Tensor]

    def put_into(self, parts: HeadTail) -> None:
        """Raises CheckpointError if they are not what the job trains in these parts."""
        residuals = {name: value for name, value in self.tensors.items() if name.startswith(RESIDUAL)}
        values = {name: value for name, value in self.tensors.items() if name not in residuals}
        if {name: p.shape for name, p in parts.parameters.items()} != {n: value.shape for n, value in values.items()}:
            raise CheckpointError(f"{self.source}: its tensors are not those that the job trains in this model")
        load_trained(parts.parameters, values)
        added = {n.removeprefix(RESIDUAL).removesuffix(".weight"): value for n, value in residuals.items()}
        try:
            parts.residuals.put(added)
        except TensorError as error:
            raise CheckpointError(f"{self.source}: {error.message}") from None


def job_of(out: Path) -> Job:
    """The job that came to its end in `out`. Raises CheckpointError, JobError."""
    path = out / RESULT
    values = _document(path).get("job")
    if values is None:
        raise CheckpointError(f"{path}: not a job's result")
    return parse_job(values, str(path))


def result_in(out: Path) -> ClientState:
    """Raises CheckpointError."""
    try:
        return ClientState(out, load_file(out / TRAINED))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out / TRAINED}: cannot be read ({error})") from None


def newest_in(out: Path, job_digest: str) -> ClientState:
    """The result of the job, else its newest checkpoint. Raises CheckpointError if there is neither, or another job's.

    A checkpoint is written when a round's steps are done: it has what this client trained, before the average.
    """
    if (out / RESULT).exists():
        _same_job(out, _document(out / RESULT).get("job_digest"), job_digest)
        return result_in(out)
    numbers = state_files.numbers(out)
    if not numbers:
        raise CheckpointError(f"{out}: no result and no checkpoint", hint=HINT)
    tensors, facts = state_files.load(out, numbers[-1])
    _same_job(out, facts.get("job"), job_digest)
    trained = under("trained/", tensors)
    return ClientState(state_files.path_of(out, numbers[-1]), trained)


def _same_job(out: Path, found: Any, due: str) -> None:
    if found != due:
        raise CheckpointError(f"{out}: belongs to another job than the invitation", hint=HINT)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except OSError:
        raise CheckpointError(f"{path}: no finished job", hint=HINT) from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a job's result")
    return document
