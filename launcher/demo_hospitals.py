"""The small invented world of the demo: what diseases look like, and how three hospitals differ.

The relation between disease and findings is the same everywhere; who falls ill of what, and how it is written down, is
not. Everything here is made up for the demo and simplified: it is no medical knowledge.
"""

from dataclasses import dataclass

WINTER = ("influenza", "pneumonia", "asthma", "bronchitis")
TRAVEL = ("gastroenteritis", "hepatitis", "malaria", "dengue")
CHRONIC = ("gout", "migraine", "anaemia", "hypothyroidism")

FINDINGS: dict[str, tuple[str, ...]] = {
    "influenza": ("fever", "muscle aches", "headache", "dry cough", "sore throat", "sudden onset"),
    "pneumonia": ("fever", "productive cough", "chest pain", "shortness of breath", "chills", "lung crackles"),
    "asthma": ("wheeze", "shortness of breath", "chest tightness", "dry cough", "worse at night", "worse on exercise"),
    "bronchitis": ("productive cough", "wheeze", "sore throat", "fatigue", "chest tightness", "a recent cold"),
    "gastroenteritis": ("vomiting", "diarrhoea", "stomach cramps", "fever", "nausea", "thirst"),
    "hepatitis": ("jaundice", "dark urine", "nausea", "fatigue", "poor appetite", "a tender liver"),
    "malaria": ("fever", "chills", "night sweats", "headache", "travel in the tropics", "vomiting"),
    "dengue": ("fever", "a rash", "pain behind the eyes", "muscle aches", "joint pain", "travel in the tropics"),
    "gout": ("joint pain", "a swollen toe", "a hot joint", "sudden onset", "worse at night", "worse after meals"),
    "migraine": ("headache", "light sensitivity", "nausea", "flashing lights", "vomiting", "worse on exercise"),
    "anaemia": ("fatigue", "pale skin", "shortness of breath", "dizziness", "palpitations", "brittle nails"),
    "hypothyroidism": ("fatigue", "weight gain", "cold intolerance", "dry skin", "brittle nails", "constipation"),
}
DISEASES = tuple(FINDINGS)

# What a note mentions besides, whatever the disease.
HISTORY = (
    "no known allergies",
    "former smoker",
    "lives alone",
    "lives with family",
    "works in an office",
    "works outdoors",
    "takes vitamin D",
    "vaccinated last autumn",
    "appendix removed in childhood",
    "mild hay fever",
    "wears glasses",
    "walks daily",
)


@dataclass(frozen=True)
class Hospital:
    """One hospital: the diseases it sees often and rarely (the others never), its note templates, its own wording.

    Templates hold the fields that `demo_data` fills; `wording` maps a common phrase to this hospital's phrase.
    """

    often: tuple[str, ...]
    rarely: tuple[str, ...]
    templates: tuple[str, ...]
    wording: dict[str, str]


HOSPITALS: dict[str, Hospital] = {
    "north": Hospital(
        often=WINTER,
        rarely=TRAVEL,
        templates=(
            "Pt {age} {sex_short}. C/o {findings}. Obs: T {temperature}, HR {pulse}, BP {systolic}/{diastolic}. "
            "PMH: {history}.",
            "Pt {age} {sex_short}. PMH: {history}. Obs: T {temperature}, HR {pulse}. C/o {findings}.",
        ),
        wording={
            "shortness of breath": "SOB",
            "fever": "pyrexia",
            "nausea": "feels sick",
            "fatigue": "TATT",
            "no known allergies": "NKDA",
            "former smoker": "ex-smoker",
        },
    ),
    "harbour": Hospital(
        often=TRAVEL,
        rarely=CHRONIC,
        templates=(
            "A {sex} of {age} years came to the harbour clinic with {findings}. Temperature {temperature}, "
            "pulse {pulse}. Background: {history}.",
            "A {sex} of {age} years, seen on the ward. Background: {history}. The main complaints are {findings}. "
            "Pulse {pulse}, temperature {temperature}.",
        ),
        wording={"fatigue": "tiredness", "vomiting": "throwing up", "chills": "shivering", "a rash": "red spots"},
    ),
    "valley": Hospital(
        often=CHRONIC,
        rarely=WINTER,
        templates=(
            "Known to us: {history}. This {age} year old {sex} reports {findings}. Blood pressure {systolic} over "
            "{diastolic}, heart rate {pulse}, temperature {temperature}.",
            "Heart rate {pulse}, temperature {temperature}, blood pressure {systolic} over {diastolic}. This {age} "
            "year old {sex} reports {findings}. Known to us: {history}.",
        ),
        wording={
            "shortness of breath": "breathlessness",
            "joint pain": "sore joints",
            "dizziness": "giddiness",
            "productive cough": "cough with phlegm",
        },
    ),
}
