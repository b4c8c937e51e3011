"""The demo's jobs: the project's own small model trained from scratch, or LoRA on a real checkpoint."""

from pathlib import Path

from launcher.demo_data import public_texts, write_hospitals
from launcher.demo_model import write_demo_model
from shared.job import Cohort, Data, Full, Job, Lora, Rounds, Split, Training

TRAIN_ROWS = 600
VALIDATION_ROWS = 100
PUBLIC_ROWS = 600


def own_data(out: Path, seed: int) -> list[tuple[str, Path, Path]]:
    """The hospitals' notes and the untrained model under `out`, made from `seed`: (name, rows, validation rows)."""
    files = write_hospitals(out / "data", seed, TRAIN_ROWS, VALIDATION_ROWS)
    if not (out / "model" / "config.json").exists():
        write_demo_model(out / "model", public_texts(seed, PUBLIC_ROWS), seed)
    return [(name, paths.train, paths.validation) for name, paths in files.items()]


def default_job(model: str, clients: int, seed: int) -> Job:
    """All weights from scratch: what the demo trains unless told otherwise."""
    return Job(
        name="hospitals",
        model_name_or_path=model,
        split=Split(head_blocks=1, tail_blocks=1),
        method=Full(),
        training=Training(
            per_device_train_batch_size=8, learning_rate=2e-3, weight_decay=0.01, warmup_ratio=0.1, seed=seed
        ),
        data=Data(max_length=128),
        rounds=Rounds(count=24, local_steps=10, evaluate_every=4),
        cohort=Cohort(clients=clients),
    )


def real_job(model: str, clients: int, seed: int) -> Job:
    """LoRA in head, trunk and tail of a real checkpoint: 200 steps in 20 rounds."""
    return Job(
        name="demo",
        model_name_or_path=model,
        split=Split(head_blocks=1, tail_blocks=1),
        method=Lora(r=16, lora_alpha=32),
        training=Training(per_device_train_batch_size=4, learning_rate=1e-3, warmup_ratio=0.05, seed=seed),
        data=Data(max_length=128),
        rounds=Rounds(count=20, local_steps=10, evaluate_every=5),
        cohort=Cohort(clients=clients),
    )
