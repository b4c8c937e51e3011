"""Training methods, one file each: what a method trains in a part, and how much room it leaves for rows."""

from collections.abc import Callable, Mapping

from shared.errors import JobError
from shared.job import Job, Prefix, Prompt
from shared.model.carve import Part
from shared.model.methods import full, lora, prefix, prompt

# By `method.type`: adds, or frees, what is trained in a part whose weights are frozen, in place. May raise JobError.
METHODS: Mapping[str, Callable[[Part, Job], None]] = {
    "lora": lora.add,
    "full": full.add,
    "prefix": prefix.add,
    "prompt": prompt.add,
}


def longest_row(job: Job, context: int) -> int:
    """How many tokens of its own a row may have, for a model that knows `context` positions. Raises JobError."""
    room = min(job.data.max_length, context)
    if isinstance(job.method, Prefix | Prompt):
        # A prefix takes positions alone; a prompt's tokens are tokens of the row.
        room = min(job.data.max_length - job.prompt_tokens, context - job.method.num_virtual_tokens)
        if room < 2:
            raise JobError(
                f"method.num_virtual_tokens={job.method.num_virtual_tokens} leaves no room for rows: the model's "
                f"context is {context} tokens, data.max_length={job.data.max_length}"
            )
    return room
