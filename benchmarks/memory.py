"""What each role holds in memory: client and server processes of a real job against training the whole model.

Beside split training the same job as plain FedAvg (`split: {trunk: client}`), and the bytes that clients sent and
received in both (of these few steps; docs/adr/0013-plain-fedavg.md says how they grow).

A random Llama of 125 M parameters, saved as sharded safetensors, LoRA, two steps of 4 rows of 32 tokens. Each figure is
the peak resident memory of a process that did nothing else, interpreter and libraries included; "own" is what is left
without those.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from shared.job import Cohort, Job, Lora, Rounds, Split, Training

VOCABULARY = 26_000
STEPS = 2
BATCH = 4
TOKENS = 32
SIZE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
PROCESSES = ("whole", "client", "server", "plain FedAvg client", "plain FedAvg server")
QUICK_SIZE = SIZE | {"num_hidden_layers": 6, "vocab_size": 8_000}

# In a process of its own: what torch, transformers and peft alone take, or a whole model trained on the job's rows.
LIBRARIES = "import torch, transformers, peft; from transformers import LlamaForCausalLM"
WHOLE = """
import json, sys
from pathlib import Path
from typing import Any
from launcher.baselines import train_whole
from shared.job import load_job
from shared.model.checkpoint import Checkpoint
from worker_client.client import load_tokenizer
from worker_client.data import load_rows
job = load_job(Path(sys.argv[1]))
rows = load_rows(Path(sys.argv[2]), load_tokenizer(Checkpoint(job.model_name_or_path)), max_length=64).rows
train_whole(job, {"a": rows}, {}, threads=1)
"""
REPORT_PEAK = "\nfrom launcher.peak_memory import peak_memory_bytes; print(peak_memory_bytes())"


def peak_of(script: str, *arguments: str) -> int:
    """Peak resident bytes of a Python process that runs `script`."""
    done = subprocess.run(
        [sys.executable, "-c", script + REPORT_PEAK, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


def measure(folder: Path, size: dict[str, Any]) -> dict[str, int]:
    """Peak resident bytes: libraries, whole, roles of both kinds; body bytes on the wire; those of the weights."""
    torch.set_num_threads(1)
    model = save_tiny_model("llama", folder / "model", max_shard_size="64MB", **size)
    save_word_tokenizer(model, size["vocab_size"])
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    draw = random.Random(0)
    words = [" ".join(f"w{draw.randrange(2, size['vocab_size'])}" for _ in range(TOKENS)) for _ in range(2 * BATCH)]
    data = folder / "a.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    job = Job(
        model_name_or_path=str(model),
        method=Lora(r=8),
        training=Training(per_device_train_batch_size=BATCH),
        rounds=Rounds(count=1, local_steps=STEPS),
        cohort=Cohort(clients=1),
    )
    run = local_run.train_together(job, [local_run.Site("a", data, data)], folder / "run")
    peaks = {process.role: process.peak_memory_bytes for process in run.processes}
    plain_job = job.model_copy(update={"split": Split(trunk="client")})
    plain = local_run.train_together(plain_job, [local_run.Site("a", data, data)], folder / "plain-run")
    plain_peaks = {process.role: process.peak_memory_bytes for process in plain.processes}
    return {
        "weights": weights,
        "libraries": peak_of(LIBRARIES),
        "whole": peak_of(WHOLE, str(folder / "run" / "job.yaml"), str(data)),
        "client": peaks["client"],
        "server": peaks["server"],
        "broker": peaks["broker"],
        "plain FedAvg client": plain_peaks["client"],
        "plain FedAvg server": plain_peaks["server"],
        "wire": run.bytes_up + run.bytes_down,
        "plain FedAvg wire": plain.bytes_up + plain.bytes_down,
    }


def main() -> None:
    arguments = parser("memory", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peaks = measure(Path(folder), QUICK_SIZE if arguments.quick else SIZE)
    wire = {name: peaks.pop(name) for name in ("wire", "plain FedAvg wire")}
    own = {name: peaks[name] - peaks["libraries"] for name in PROCESSES}
    figures = {
        "client_over_whole": peaks["client"] / peaks["whole"],
        "server_over_whole": peaks["server"] / peaks["whole"],
        "client_own_over_whole_own": own["client"] / own["whole"],
        "server_own_over_whole_own": own["server"] / own["whole"],
        "peak_bytes": peaks,
        "wire_bytes": wire,
    }
    publish(
        "memory",
        ["process", "peak MB", "own MB", "peak / whole", "own / whole own"],
        [
            [
                name,
                f"{peaks[name] / 1e6:,.0f}",
                f"{own[name] / 1e6:,.0f}",
                f"{peaks[name] / peaks['whole']:.2f}",
                f"{own[name] / own['whole']:.2f}",
            ]
            for name in PROCESSES
        ],
        figures,
        [
            Goal("client_over_whole", peaks["client"] / peaks["whole"], 1.0, at_most=True),
            Goal("server_over_whole", peaks["server"] / peaks["whole"], 1.0, at_most=True),
        ],
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
