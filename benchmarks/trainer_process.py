"""transformers.Trainer with peft on pooled rows: model, folder, steps, rows a step, group by length, data files.

Prints tokens/s, padding not counted, after the first steps. Run by benchmarks.throughput as a process of its own.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from worker_client.data import load_rows

WARM_UP_STEPS = 3


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times the steps after the first few."""

    def __init__(self) -> None:
        self.began = 0.0
        self.ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.monotonic()
        if state.global_step == WARM_UP_STEPS:
            self.began = self.ended


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, rows: list[tuple[int, ...]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": list(self.rows[index])}


class Collator:
    """Right padding, as people do; counts the real tokens of each batch."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
        mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
        self.tokens.append(sum(lengths))
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main() -> None:
    path, folder, steps, batch, by_length, *data = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [row.input_ids for file in data for row in load_rows(Path(file), tokenizer, max_length=128).rows]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    clock, collator = Clock(), Collator()
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=int(steps),
        per_device_train_batch_size=int(batch),
        learning_rate=1e-4,
        train_sampling_strategy="group_by_length" if int(by_length) else "random",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=settings, train_dataset=Rows(rows), data_collator=collator, callbacks=[clock]).train()
    print(sum(collator.tokens[WARM_UP_STEPS : int(steps)]) / (clock.ended - clock.began))


if __name__ == "__main__":
    main()
