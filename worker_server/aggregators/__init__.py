"""Methods of aggregation, one file each, by their `aggregation.type` in the job."""

from worker_server.aggregators import (
    fedadam,
    fedavg,
    fedavgm,
    fedsgd,
    fedyogi,
    krum,
    median,
    multi_krum,
    scaffold,
    trimmed_mean,
)
from worker_server.aggregators.method import Method

METHODS: dict[str, Method] = {
    "fedavg": fedavg.METHOD,
    "fedavgm": fedavgm.METHOD,
    "fedadam": fedadam.METHOD,
    "fedyogi": fedyogi.METHOD,
    "fedsgd": fedsgd.METHOD,
    "scaffold": scaffold.METHOD,
    "median": median.METHOD,
    "trimmed_mean": trimmed_mean.METHOD,
    "krum": krum.METHOD,
    "multi_krum": multi_krum.METHOD,
}
