"""What the cells of benchmarks.methods say together: gaps, what non-IID data cost, what gives it back. No I/O."""

from collections.abc import Mapping, Sequence

from benchmarks.cells import Figures
from benchmarks.method_table import BY_SOURCE, IID, SETTINGS
from launcher.charts import Bar, BarGroup, bar_chart

# By method and setting ("centralised", "alone" among them) of one corpus.
Cell = tuple[str, str]
Found = Mapping[Cell, Figures]

CENTRALISED, ALONE = "centralised", "alone, by source"
ALONE_IID = "alone, IID"
KINDS = {**dict.fromkeys(SETTINGS, "together"), CENTRALISED: "centralised", ALONE: "alone", ALONE_IID: "alone"}
COLUMNS = (
    "method", "setting", "loss", "accuracy", "MB up", "MB down", "client peak MB", "client GFLOP", "seconds",
)  # fmt: skip


def gap(joint: float, centralised: float) -> float:
    """How far a joint run's loss is above the centralised one's, as a fraction of that."""
    return (joint - centralised) / centralised


def gaps_of(found: Found, setting: str) -> dict[str, float]:
    """By method, of the joint runs of a setting."""
    return {
        method: gap(figures["loss"], found[method, CENTRALISED]["loss"])
        for (method, of), figures in found.items()
        if of == setting and (method, CENTRALISED) in found
    }


def cost_of_sources(found: Found) -> dict[str, float]:
    """By method, the loss of three clients by source over that of three IID clients."""
    return {
        method: figures["loss"] / found[method, IID]["loss"]
        for (method, setting), figures in found.items()
        if setting == BY_SOURCE and (method, IID) in found
    }


def given_back(iid: float, fedavg: float, other: float) -> float | None:
    """Of what the loss by source is above the IID one under FedAvg, the share that another method takes away: 1 is all
    of it, below 0 it adds to it. None where nothing was lost."""
    return (fedavg - other) / (fedavg - iid) if fedavg > iid else None


def rows(found: Found) -> list[list[str]]:
    """The table, a line a cell."""
    return [
        [
            method,
            setting,
            f"{figures['loss']:.4f}",
            f"{figures['accuracy']:.1%}" if "accuracy" in figures else "",
            *(_scaled(figures, name, 1e6) for name in ("bytes_up_per_client", "bytes_down_per_client")),
            _scaled(figures, "client_peak_bytes", 1e6),
            _scaled(figures, "client_flops", 1e9),
            f"{figures['seconds']:.0f}",
        ]
        for (method, setting), figures in found.items()
    ]


def _scaled(figures: Figures, name: str, unit: float) -> str:
    return f"{figures[name] / unit:,.1f}" if name in figures else ""


def _label(setting: str) -> str:
    """Short enough for a bar."""
    return setting.removeprefix("3 clients ").replace("by source", "sources")


def picture(found: Found, corpus: str) -> str:
    """Bars of held-out loss, a group a method."""
    methods: Sequence[str] = list(dict.fromkeys(method for method, _ in found))
    groups = [
        BarGroup(
            method,
            [
                Bar(_label(setting), figures["loss"], KINDS[setting])
                for (mine, setting), figures in found.items()
                if mine == method
            ],
        )
        for method in methods
    ]
    described = "; ".join(f"{method}, {setting}: {figures['loss']:.4f}" for (method, setting), figures in found.items())
    return bar_chart(
        groups, title=f"held-out loss, {corpus}", description=described, format_value=lambda value: f"{value:.3f}"
    )
