"""The registry of tasks: one entry a task, everything that is its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker_client.evaluation import classification, superglue, templates
from worker_client.evaluation.cases import Case, Template
from worker_client.evaluation.metrics import Metrics, accuracy, accuracy_and_macro_f1, multirc, record
from worker_client.record_files import read_records

Records = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True)
class ChoiceTask:
    """Answered by choosing the option of largest log-likelihood given the prompt.

    `per_token`: compare means over an option's tokens, not sums; for options that are sentences of different lengths
    (GPT-3's convention, arXiv 2005.14165, section 2.4). One-word options, and the rest of one sentence with each
    candidate put in (ReCoRD), are compared by sums.
    """

    about: str
    cases: Callable[[dict[str, Any]], Iterator[Case]]
    template: Template
    metrics: Metrics
    per_token: bool = False
    records: Records = read_records


@dataclass(frozen=True)
class SummaryTask:
    """Answered by greedy continuation; ROUGE against the text under `summary`."""

    about: str
    document: str
    summary: str
    prompt: str = templates.SUMMARY


@dataclass(frozen=True)
class RowsTask:
    """Loss and perplexity on rows in the shapes that training takes, of what counts in the loss there."""

    about: str


Task = ChoiceTask | SummaryTask | RowsTask

TASKS: dict[str, Task] = {
    "rows": RowsTask("loss and perplexity on training's kinds of rows"),
    "boolq": ChoiceTask("SuperGLUE BoolQ, JSONL", superglue.boolq, templates.BOOLQ, accuracy),
    "cb": ChoiceTask("SuperGLUE CB, JSONL", superglue.cb, templates.CB, accuracy_and_macro_f1),
    "copa": ChoiceTask("SuperGLUE COPA, JSONL", superglue.copa, templates.COPA, accuracy, per_token=True),
    "multirc": ChoiceTask("SuperGLUE MultiRC, JSONL", superglue.multirc, templates.MULTIRC, multirc),
    "record": ChoiceTask("SuperGLUE ReCoRD, JSONL", superglue.record, templates.RECORD, record),
    "rte": ChoiceTask("SuperGLUE RTE, JSONL", superglue.rte, templates.RTE, accuracy),
    "wic": ChoiceTask("SuperGLUE WiC, JSONL", superglue.wic, templates.WIC, accuracy),
    "wsc": ChoiceTask("SuperGLUE WSC, JSONL", superglue.wsc, templates.WSC, accuracy),
    "sst2": ChoiceTask(
        'SST-2, lines "0 ..." and "1 ..."',
        classification.sst2,
        templates.SST2,
        accuracy,
        records=classification.sst2_lines,
    ),
    "agnews": ChoiceTask("AG News, CSV", classification.agnews, templates.AGNEWS, accuracy),
    "summaries": SummaryTask('rows {"document", "summary"}', "document", "summary"),
    "mts_dialog": SummaryTask("MTS-Dialog, CSV", "dialogue", "section_text"),
}
