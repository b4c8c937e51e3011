"""Reading what a role's `/metrics` says."""

import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from shared.errors import ConnectionFailed
from shared.monitoring import split_address

TIMEOUT_S = 5.0
MAX_BYTES = 2**20


def scrape(address: str) -> dict[str, float]:
    """Samples by name, labels in braces: `flglm_broker_bytes_total{direction="up"}`.

    Raises ConnectionFailed if nobody answers there, or not with metrics; UsageError for what is no address.
    """
    split_address(address)
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            families = list(text_string_to_metric_families(answer.read(MAX_BYTES).decode()))
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ConnectionFailed(
            f"no metrics at {address} ({error})", hint="start the role with --metrics-address, and name it here"
        ) from None
    return {_key(sample.name, sample.labels): sample.value for family in families for sample in family.samples}


def _key(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{shown}}}" if shown else name
