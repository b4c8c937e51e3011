"""What a run was worth: numbers for machines (report.json), a page for people (report.html), a table on screen."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from launcher.report_data import ClientPrivacy, ClientQuality, Curve, Process, Quality, Report, alone_text, metric_text
from launcher.report_page import page

__all__ = ["ClientPrivacy", "ClientQuality", "Curve", "Process", "Quality", "Report", "summary_table", "write_report"]


def write_report(report: Report, directory: Path) -> None:
    """Write `report.json` (numbers that are not finite become null) and `report.html` to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (directory / "report.html").write_text(page(report), encoding="utf-8")


def summary_table(report: Report) -> Table:
    """A row a client, on its own validation rows, and one for all of them; columns alone, joint, centralised."""
    quality = report.quality
    better = "higher" if quality.higher_is_better else "lower"
    table = Table(title=f"{escape(report.title)}: {escape(quality.metric)}, {better} is better")
    table.add_column("validation rows of")
    table.add_column("alone", justify="right")
    table.add_column("joint", justify="right", style="bold")
    table.add_column("centralised", justify="right")
    for name, own in report.by_client.items():
        shown = (metric_text(quality.metric, value) for value in (own.alone, own.joint, own.centralised))
        table.add_row(escape(name), *shown)
    table.add_section()
    joint, centralised = (metric_text(quality.metric, value) for value in (quality.joint, quality.centralised))
    table.add_row("everyone", alone_text(quality), joint, centralised)
    return table
