"""Synthetic clinical notes for the demo, the same for the same seed.

Rows are what users bring: one JSON object a line, `{"prompt": note + "\\nDiagnosis:", "completion": " gout"}`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from launcher.demo_hospitals import DISEASES, FINDINGS, HISTORY, HOSPITALS, Hospital
from shared.errors import UsageError

Row = dict[str, str]

# With four diseases seen often and four rarely, a rare one makes up 1 note in 24.
OFTEN_WEIGHT = 5
RARELY_WEIGHT = 1
INCIDENTAL_SHARE = 0.5


@dataclass(frozen=True)
class HospitalFiles:
    """Where one hospital's rows lie. Validation rows follow the hospital's own mix of diseases."""

    train: Path
    validation: Path


def write_hospitals(directory: Path, seed: int, train_rows: int, validation_rows: int) -> dict[str, HospitalFiles]:
    """Write `<hospital>/train.jsonl` and `<hospital>/validation.jsonl` under `directory`, with that many rows.

    Raises UsageError when a number of rows is below 1.
    """
    if train_rows < 1 or validation_rows < 1:
        raise UsageError("a hospital needs at least 1 row to train on and 1 to validate with")
    files = {}
    for name, hospital in HOSPITALS.items():
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        files[name] = HospitalFiles(folder / "train.jsonl", folder / "validation.jsonl")
        write_rows(files[name].train, hospital_rows(hospital, Random(f"{seed}/{name}/train"), train_rows))
        write_rows(
            files[name].validation, hospital_rows(hospital, Random(f"{seed}/{name}/validation"), validation_rows)
        )
    return files


def public_texts(seed: int, rows: int) -> list[str]:
    """Notes that belong to no hospital, of all diseases and in all ways of writing: for a public tokenizer.

    Raises UsageError when `rows` is below 1.
    """
    if rows < 1:
        raise UsageError("a tokenizer needs at least 1 text")
    random = Random(f"{seed}/public")
    hospitals = tuple(HOSPITALS.values())
    made = (make_row(random.choice(hospitals), random.choice(DISEASES), random) for _ in range(rows))
    return [row["prompt"] + row["completion"] for row in made]


def hospital_rows(hospital: Hospital, random: Random, count: int) -> list[Row]:
    """`count` rows of the hospital's own mix of diseases."""
    seen = hospital.often + hospital.rarely
    weights = [OFTEN_WEIGHT] * len(hospital.often) + [RARELY_WEIGHT] * len(hospital.rarely)
    return [make_row(hospital, disease, random) for disease in random.choices(seen, weights, k=count)]


def make_row(hospital: Hospital, disease: str, random: Random) -> Row:
    """One note of this hospital about a patient with this disease: 3 or 4 typical findings among distractors."""
    findings = draw_findings(disease, random)
    history = random.sample(HISTORY, random.choice((1, 2, 3)))
    sex, sex_short = random.choice((("woman", "F"), ("man", "M")))
    feverish = "fever" in findings
    note = random.choice(hospital.templates).format(
        age=random.randint(18, 89),
        sex=sex,
        sex_short=sex_short,
        temperature=f"{random.uniform(38.0, 39.9) if feverish else random.uniform(36.2, 37.4):.1f}",
        pulse=random.randrange(58, 120, 2),
        systolic=random.randrange(100, 165, 5),
        diastolic=random.randrange(60, 100, 5),
        findings=_listed(hospital, findings),
        history=_listed(hospital, history),
    )
    return {"prompt": f"{note}\nDiagnosis:", "completion": f" {disease}"}


def draw_findings(disease: str, random: Random) -> list[str]:
    """3 or 4 typical findings and, in every second note, one that has nothing to do with the disease; in any order."""
    findings = random.sample(FINDINGS[disease], random.choice((3, 4)))
    if random.random() < INCIDENTAL_SHARE:
        other = random.choice([name for name in DISEASES if name != disease])
        findings.append(random.choice([finding for finding in FINDINGS[other] if finding not in FINDINGS[disease]]))
    random.shuffle(findings)
    return findings


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows to `path`, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _listed(hospital: Hospital, phrases: list[str]) -> str:
    """`a, b, c` in the hospital's own words."""
    return ", ".join(hospital.wording.get(phrase, phrase) for phrase in phrases)
