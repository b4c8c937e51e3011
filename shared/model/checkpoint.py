"""A pretrained checkpoint on disk or on the hub: its config, where each tensor lies, and what identifies it.

Only safetensors are read, and of those only the tensors asked for. No pickled weights, no remote code.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from shared.errors import ModelError
from shared.job import Job

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLED_BYTES = 4096
# Families compute with what the file says before they check it.
_NO_CONFIGURATION = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Fingerprint:
    """Hex digests of what must agree between a client's checkpoint and the server's.

    `weights` covers the first 4 KiB of every tensor: enough to tell two checkpoints apart, without reading gigabytes.
    It catches mistakes; it is no proof against an owner who lies about his own model.
    """

    config: str
    tensors: str
    weights: str

    def difference(self, other: "Fingerprint") -> str | None:
        """What differs, in words; None if nothing does."""
        if self.config != other.config:
            return "the configurations differ (config.json)"
        if self.tensors != other.tensors:
            return "the names, shapes or dtypes of the tensors differ"
        if self.weights != other.weights:
            return "the weights differ"
        return None


class Checkpoint:
    """A Hugging Face causal language model in a folder or, by its id, on the hub (downloaded file by file).

    With `drawn_from` a model without weights: they are drawn from that seed, and any that lie there are not looked at.
    """

    def __init__(self, name_or_path: str, drawn_from: int | None = None) -> None:
        """Reads the config and the index alone. Raises ModelError."""
        self.name_or_path = name_or_path
        self.drawn_from = drawn_from
        self.folder = Path(name_or_path).expanduser()
        self.is_local = self.folder.is_dir()
        if not self.is_local and (self.folder.is_absolute() or name_or_path.startswith((".", "~"))):
            raise ModelError(f"no model folder at {name_or_path}", hint="set model_name_or_path (or --model)")
        self.config: Any = self._read_config()
        self.files = self._index() if drawn_from is None else {}

    def _read_config(self) -> Any:
        path = self.file("config.json")
        try:
            return AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
        except _NO_CONFIGURATION as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(f"{path}: not a model configuration ({reason})") from None

    def file(self, name: str) -> Path:
        """The local path of one file of the checkpoint; downloads it from the hub where needed. Raises ModelError."""
        if self.is_local:
            path = self.folder / name
            if not os.path.isfile(path):  # unlike Path.is_file, whatever an index says
                raise ModelError(f"{self.folder}: the checkpoint has no {name}")
            return path
        try:
            return Path(hf_hub_download(self.name_or_path, name))
        except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, EntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ModelError(
                f"'{self.name_or_path}' is neither a folder nor a model that the hub gives us ({name}: {reason})"
            ) from None

    def _index(self) -> dict[str, str]:
        """Tensor name to file name."""
        if self._has(INDEX):
            path = self.file(INDEX)
            try:
                return {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ModelError(f"{path}: not a safetensors index") from None
        if not self._has(SINGLE):
            raise ModelError(
                f"{self.name_or_path}: no {SINGLE} and no {INDEX}",
                hint="convert the checkpoint with save_pretrained(..., safe_serialization=True), or begin without one: "
                "training.from_scratch=true",
            )
        with self._open(SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)

    def _has(self, name: str) -> bool:
        if self.is_local:
            return (self.folder / name).is_file()
        try:
            self.file(name)
        except ModelError:
            return False
        return True

    def _open(self, file: str) -> Any:
        path = self.file(file)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: corrupt or unreadable safetensors ({error})") from None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file, each file open only while it is read. Raises ModelError."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise ModelError(f"{self.name_or_path}: the checkpoint has no tensor {name}")
            by_file.setdefault(self.files[name], []).append(name)
        for file, wanted in sorted(by_file.items()):
            with self._open(file) as tensors:
                for name in wanted:
                    try:
                        yield name, tensors.get_tensor(name)
                    except SafetensorError as error:
                        raise ModelError(f"{self.name_or_path}/{file}: tensor {name}: {error}") from None

    def fingerprint(self) -> Fingerprint:
        """Digests of the configuration, of the tensor table, and of the first bytes of each tensor, or the seed."""
        config = self.config.to_dict()
        for cosmetic in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"):
            config.pop(cosmetic, None)
        rows: dict[str, tuple[str, bytes]] = {}
        for file in set(self.files.values()):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    tensor = tensors.get_slice(name)
                    rows[name] = (f"{name} {tensor.get_dtype()} {tensor.get_shape()}\n", _first_bytes(tensor))
        table, weights = hashlib.sha256(), hashlib.sha256()
        for name in sorted(rows):  # however the tensors are spread over files
            table.update(rows[name][0].encode())
            weights.update(rows[name][1])
        if self.drawn_from is not None:
            table.update(b"drawn from a seed")
            weights.update(str(self.drawn_from).encode())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        return Fingerprint(digest.hexdigest(), table.hexdigest(), weights.hexdigest())


def checkpoint_of(job: Job, name_or_path: str | None = None) -> Checkpoint:
    """The model that the job begins with, where the job says or at `name_or_path`. Raises ModelError."""
    return Checkpoint(name_or_path or job.model_name_or_path, job.drawn_from)


def _first_bytes(tensor: Any) -> bytes:
    shape = tensor.get_shape()
    if not shape:
        return b""
    columns = 1
    for size in shape[1:]:
        columns *= size
    rows = min(shape[0], max(1, SAMPLED_BYTES // max(1, 8 * columns)))
    values: Tensor = tensor[:rows] if len(shape) == 1 or columns * 8 <= SAMPLED_BYTES else tensor[:1]
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()[:SAMPLED_BYTES]
