"""What a data owner says on the command line, to train and to check beforehand."""

from pathlib import Path
from typing import Annotated

import typer

InviteOption = Annotated[Path, typer.Option("--invite", help="the invitation that the operator sent")]
DataOption = Annotated[Path, typer.Option("--data", help="private rows: JSONL, .json, .csv, .parquet")]
ValidationOption = Annotated[Path | None, typer.Option("--validation", help="rows to measure on, likewise")]
ModelOption = Annotated[str | None, typer.Option("--model", help="this site's copy of the job's model")]
PolicyOption = Annotated[Path | None, typer.Option("--policy", help="what this site accepts, YAML")]
LedgerOption = Annotated[
    Path | None,
    typer.Option(
        "--privacy-ledger",
        help="what jobs spent of the rows' privacy: a file, or a folder that is there; by default beside --data",
    ),
]
GroupKeyOption = Annotated[
    Path | None, typer.Option("--group-key", help="the data owners' common key, for a job with aggregation.group_key")
]
ValidationFractionOption = Annotated[
    float, typer.Option("--validation-fraction", min=0, max=0.9, help="held out of --data, without --validation")
]
