import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.demo_data import draw_findings, hospital_rows, public_texts, write_hospitals
from launcher.demo_hospitals import DISEASES, FINDINGS, HISTORY, HOSPITALS
from shared.errors import UsageError


def mix(name: str, rows: int = 600) -> Counter[str]:
    return Counter(row["completion"].strip() for row in hospital_rows(HOSPITALS[name], Random(1), rows))


def contents(directory: Path, seed: int) -> dict[str, tuple[bytes, bytes]]:
    files = write_hospitals(directory, seed, 20, 10)
    return {name: (paths.train.read_bytes(), paths.validation.read_bytes()) for name, paths in files.items()}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    first = contents(tmp_path / "a", 7)
    assert contents(tmp_path / "b", 7) == first
    other = contents(tmp_path / "c", 8)
    assert all(other[name] != first[name] for name in HOSPITALS)


def test_files_hold_prompt_completion_rows_of_the_given_numbers(tmp_path: Path) -> None:
    for paths in write_hospitals(tmp_path, 0, 30, 12).values():
        for path, expected in ((paths.train, 30), (paths.validation, 12)):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert len(rows) == expected
            for row in rows:
                assert set(row) == {"prompt", "completion"}
                assert row["prompt"].endswith("\nDiagnosis:")
                assert len(row["prompt"]) > 60
                assert row["completion"].removeprefix(" ") in DISEASES
                assert row["completion"].startswith(" ")


def test_validation_rows_are_not_training_rows(tmp_path: Path) -> None:
    for paths in write_hospitals(tmp_path, 0, 600, 100).values():
        train = set(paths.train.read_text().splitlines())
        assert not train & set(paths.validation.read_text().splitlines())


@pytest.mark.parametrize(("train", "validation"), [(0, 1), (1, 0), (-1, 5)])
def test_no_rows_are_refused_before_anything_is_written(tmp_path: Path, train: int, validation: int) -> None:
    with pytest.raises(UsageError, match="at least 1 row"):
        write_hospitals(tmp_path / "out", 0, train, validation)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HOSPITALS)
def test_a_hospital_sees_some_diseases_often_some_rarely_some_never(name: str) -> None:
    hospital, counts = HOSPITALS[name], mix(name)
    assert min(counts[disease] for disease in hospital.often) > 2 * max(counts[d] for d in hospital.rarely)
    assert all(counts[disease] > 0 for disease in hospital.rarely)
    assert set(counts) == {*hospital.often, *hospital.rarely}
    assert len(set(DISEASES) - set(counts)) == 4


def test_together_the_hospitals_see_every_disease_often() -> None:
    often = [disease for hospital in HOSPITALS.values() for disease in hospital.often]
    assert sorted(often) == sorted(DISEASES)


def test_the_hospitals_write_differently() -> None:
    texts = {name: " ".join(row["prompt"] for row in hospital_rows(h, Random(1), 200)) for name, h in HOSPITALS.items()}
    assert "SOB" in texts["north"]
    assert "breathlessness" in texts["valley"]
    assert "SOB" not in texts["harbour"] + texts["valley"]
    for hospital in HOSPITALS.values():
        assert set(hospital.wording) <= {*HISTORY, *(f for findings in FINDINGS.values() for f in findings)}


@given(st.sampled_from(DISEASES), st.integers(0, 2**32))
def test_no_other_disease_explains_the_findings_better(disease: str, seed: int) -> None:
    findings = set(draw_findings(disease, Random(seed)))
    typical = len(findings & set(FINDINGS[disease]))
    assert typical in (3, 4)
    assert len(findings) - typical in (0, 1)
    for other in DISEASES:
        if other != disease:
            assert len(findings & set(FINDINGS[other])) <= typical


def test_nearly_every_note_has_one_best_explanation() -> None:
    random = Random(0)
    clear = 0
    for _ in range(1000):
        findings = set(draw_findings(random.choice(DISEASES), random))
        best, second = sorted((len(findings & set(typical)) for typical in FINDINGS.values()), reverse=True)[:2]
        clear += best > second
    assert clear >= 950


def test_every_disease_shares_findings_with_another() -> None:
    for disease, findings in FINDINGS.items():
        others = {finding for other, theirs in FINDINGS.items() if other != disease for finding in theirs}
        assert set(findings) & others


def test_public_texts_cover_all_diseases_and_need_a_number() -> None:
    texts = public_texts(0, 300)
    assert len(texts) == 300
    assert {text.rsplit(" ", 1)[1] for text in texts} == set(DISEASES)
    assert public_texts(0, 300) == texts
    with pytest.raises(UsageError, match="at least 1 text"):
        public_texts(0, 0)
