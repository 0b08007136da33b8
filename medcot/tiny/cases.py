"""Clinical cases whose answers are computed from published rules; standard library only.

A case is a family (one rule) and its findings. The rule gives the reasoning line by line; wording, order of findings and
irrelevant findings vary. Whether a case is held out depends on its family and findings alone (`is_held_out`), so no seed
or wording can bring a held-out case into training. Invented patients; nothing here is for clinical use.
"""

import hashlib
import math
import operator
import random
from collections.abc import Callable
from typing import NamedTuple

HELD_OUT_ONE_IN = 4  # of the distinct sets of findings; the smallest family has 120 of them
SINGLE_STEP = "single step"  # one criterion of a case is asked for: what the base model can do, replayed in training

COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Step(NamedTuple):
    """One criterion: its name, the finding with its comparison as text, and the points it gives."""

    name: str
    finding: str
    points: int

    def line(self) -> str:
        """`respiratory rate 32 >= 30: 1 point`."""
        return f"{self.name} {self.finding}: {points_phrase(self.points)}"


def points_phrase(points: int) -> str:
    """`1 point`, `2 points`."""
    return f"{points} point" + ("" if points == 1 else "s")


def compared(name: str, value: float, *options: tuple[str, float, int]) -> Step:
    """The first of (comparison, limit, points) that holds for `value`; the last one always does."""
    sign, limit, points = next(option for option in options if COMPARE[option[0]](value, option[1]))
    return Step(name, f"{value} {sign} {limit}", points)


def yes_no(name: str, present: bool, points: int) -> Step:
    """`points` if the finding is present, else none."""
    return Step(name, "yes" if present else "no", points if present else 0)


# --- the rules -------------------------------------------------------------------------------------------------------


def curb65(f: dict) -> list[Step]:
    """Severity of community-acquired pneumonia, 0 to 5 points; urea nitrogen in mg/dL, pressures in mmHg.

    Lim WS, van der Eerden MM, Laing R, et al. Thorax 2003;58:377-382 (urea > 7 mmol/L is urea nitrogen > 19 mg/dL).
    """
    systolic, diastolic = f["blood pressure"]
    if systolic < 90:
        pressure = Step("blood pressure", f"{systolic}/{diastolic} systolic < 90", 1)
    else:
        pressure = compared("blood pressure", diastolic, ("<=", 60, 1), (">", 60, 0))
        pressure = pressure._replace(finding=f"{systolic}/{diastolic} diastolic {pressure.finding.split(' ', 1)[1]}")
    return [
        yes_no("confusion", f["confusion"], 1),
        compared("urea nitrogen", f["urea nitrogen"], (">", 19, 1), ("<=", 19, 0)),
        compared("respiratory rate", f["respiratory rate"], (">=", 30, 1), ("<", 30, 0)),
        pressure,
        compared("age", f["age"], (">=", 65, 1), ("<", 65, 0)),
    ]


def cha2ds2_vasc(f: dict) -> list[Step]:
    """Stroke risk in atrial fibrillation, 0 to 9 points; age in years.

    Lip GYH, Nieuwlaat R, Pisters R, Lane DA, Crijns HJGM. Chest 2010;137:263-272.
    """
    return [
        yes_no("heart failure", f["heart failure"], 1),
        yes_no("hypertension", f["hypertension"], 1),
        compared("age", f["age"], (">=", 75, 2), (">=", 65, 1), ("<", 65, 0)),
        yes_no("diabetes", f["diabetes"], 1),
        yes_no("stroke", f["stroke"], 2),
        yes_no("vascular disease", f["vascular disease"], 1),
        yes_no("female", f["female"], 1),
    ]


def qsofa(f: dict) -> list[Step]:
    """Risk of a poor outcome in suspected infection, 0 to 3 points; breaths per minute, mmHg, Glasgow coma score.

    Singer M, Deutschman CS, Seymour CW, et al. JAMA 2016;315:801-810.
    """
    return [
        compared("respiratory rate", f["respiratory rate"], (">=", 22, 1), ("<", 22, 0)),
        compared("systolic pressure", f["systolic pressure"], ("<=", 100, 1), (">", 100, 0)),
        compared("coma score", f["coma score"], ("<", 15, 1), (">=", 15, 0)),
    ]


EYES = {"none": 1, "to pain": 2, "to speech": 3, "spontaneous": 4}
VERBAL = {"none": 1, "sounds": 2, "words": 3, "confused": 4, "oriented": 5}
MOTOR = {"none": 1, "extension": 2, "flexion": 3, "withdrawal": 4, "localising": 5, "obeying": 6}


def glasgow(f: dict) -> list[Step]:
    """Level of consciousness, 3 to 15 points over three kinds of response.

    Teasdale G, Jennett B. Lancet 1974;304:81-84; with flexion split into abnormal and withdrawal as in Teasdale G,
    Murray G, Parker L, Jennett B. Acta Neurochir Suppl 1979;28:13-16.
    """
    return [
        Step("eyes", f["eyes"], EYES[f["eyes"]]),
        Step("verbal", f["verbal"], VERBAL[f["verbal"]]),
        Step("motor", f["motor"], MOTOR[f["motor"]]),
    ]


ASCITES = {"none": 1, "mild": 2, "severe": 3}
ENCEPHALOPATHY = {"none": 1, "grade 1": 2, "grade 2": 2, "grade 3": 3, "grade 4": 3}


def child_pugh(f: dict) -> list[Step]:
    """Severity of liver disease, 5 to 15 points; bilirubin mg/dL, albumin g/dL, prothrombin time s above control.

    Pugh RNH, Murray-Lyon IM, Dawson JL, Pietroni MC, Williams R. Br J Surg 1973;60:646-649.
    """
    return [
        compared("bilirubin", f["bilirubin"], ("<", 2.0, 1), ("<=", 3.0, 2), (">", 3.0, 3)),
        compared("albumin", f["albumin"], (">", 3.5, 1), (">=", 2.8, 2), ("<", 2.8, 3)),
        compared("prothrombin time", f["prothrombin time"], ("<", 4, 1), ("<=", 6, 2), (">", 6, 3)),
        Step("ascites", f["ascites"], ASCITES[f["ascites"]]),
        Step("encephalopathy", f["encephalopathy"], ENCEPHALOPATHY[f["encephalopathy"]]),
    ]


def news2(f: dict) -> list[Step]:
    """Early warning of acute illness, 0 to 20 points, oxygen saturation on scale 1; per minute, %, mmHg, degrees C.

    Royal College of Physicians. National Early Warning Score (NEWS) 2. London: RCP, 2017; its thresholds: 0 to 4 low, 3 in
    any one parameter low-medium, 5 to 6 medium, 7 or more high.
    """
    return [
        compared(
            "respiratory rate",
            f["respiratory rate"],
            ("<=", 8, 3),
            ("<=", 11, 1),
            ("<=", 20, 0),
            ("<=", 24, 2),
            (">=", 25, 3),
        ),
        compared("saturation", f["saturation"], ("<=", 91, 3), ("<=", 93, 2), ("<=", 95, 1), (">=", 96, 0)),
        yes_no("oxygen", f["oxygen"], 2),
        compared(
            "systolic pressure",
            f["systolic pressure"],
            *(("<=", 90, 3), ("<=", 100, 2), ("<=", 110, 1), ("<=", 219, 0), (">=", 220, 3)),
        ),
        compared(
            "pulse",
            f["pulse"],
            *(("<=", 40, 3), ("<=", 50, 1), ("<=", 90, 0), ("<=", 110, 1), ("<=", 130, 2), (">=", 131, 3)),
        ),
        Step("consciousness", f["consciousness"], 0 if f["consciousness"] == "alert" else 3),
        compared(
            "temperature",
            f["temperature"],
            *(("<=", 35.0, 3), ("<=", 36.0, 1), ("<=", 38.0, 0), ("<=", 39.0, 1), (">=", 39.1, 2)),
        ),
    ]


BLOOD_GAS = (("pH", 7.35, 7.45), ("pCO2", 35, 45), ("bicarbonate", 22, 26))  # normal limits: none, mmHg, mmol/L
DISORDERS = {  # (pH, pCO2, bicarbonate) -> disorder; other combinations are not asked
    ("normal", "normal", "normal"): "normal acid-base status",
    ("low", "normal", "low"): "uncompensated metabolic acidosis",
    ("low", "low", "low"): "partly compensated metabolic acidosis",
    ("low", "high", "normal"): "uncompensated respiratory acidosis",
    ("low", "high", "high"): "partly compensated respiratory acidosis",
    ("low", "high", "low"): "mixed acidosis",
    ("high", "normal", "high"): "uncompensated metabolic alkalosis",
    ("high", "high", "high"): "partly compensated metabolic alkalosis",
    ("high", "low", "normal"): "uncompensated respiratory alkalosis",
    ("high", "low", "low"): "partly compensated respiratory alkalosis",
    ("high", "low", "high"): "mixed alkalosis",
}


def acid_base(f: dict) -> list[tuple[str, str]]:
    """(line, low | normal | high) for pH, pCO2 in mmHg and bicarbonate in mmol/L of an arterial blood gas.

    Berend K, de Vries APJ, Gans ROB. N Engl J Med 2014;371:1434-1445, with the reference ranges of `BLOOD_GAS`.
    """
    read = []
    for name, low, high in BLOOD_GAS:
        value = f[name]
        if value < low:
            read.append((f"{name} {value} < {low}: low", "low"))
        elif value <= high:
            read.append((f"{name} {value} within {low}-{high}: normal", "normal"))
        else:
            read.append((f"{name} {value} > {high}: high", "high"))
    return read


# --- findings: drawn, and put into words -------------------------------------------------------------------------------


def _tenths(rng: random.Random, low: float, high: float) -> float:
    """A value in [low, high] with one decimal."""
    return rng.randint(round(low * 10), round(high * 10)) / 10


def _blood_gas(rng: random.Random) -> dict:
    """A gas that obeys Henderson and Hasselbalch: pH = 6.1 + log10(bicarbonate / (0.03 pCO2)), each disorder as often."""
    wanted = rng.choice(list(DISORDERS.values()))
    while True:
        gas = {"pCO2": rng.randint(18, 75), "bicarbonate": rng.randint(9, 40)}
        gas["pH"] = round(6.1 + math.log10(gas["bicarbonate"] / (0.03 * gas["pCO2"])), 2)
        if 7.05 <= gas["pH"] <= 7.65 and DISORDERS.get(tuple(state for _, state in acid_base(gas))) == wanted:
            return gas


def _draw_curb65(rng: random.Random) -> dict:
    return {
        "confusion": rng.random() < 0.5,
        "urea nitrogen": rng.randint(8, 32),
        "respiratory rate": rng.randint(14, 42),
        "blood pressure": (rng.randint(76, 140), rng.randint(44, 75)),
        "age": rng.randint(30, 95),
    }


def _draw_cha2ds2_vasc(rng: random.Random) -> dict:
    flags = ("heart failure", "hypertension", "diabetes", "stroke", "vascular disease", "female")
    return {"age": rng.randint(50, 92)} | {flag: rng.random() < 0.5 for flag in flags}


def _draw_qsofa(rng: random.Random) -> dict:
    return {
        "respiratory rate": rng.randint(12, 34),
        "systolic pressure": rng.randint(76, 130),
        "coma score": rng.choice((9, 10, 11, 12, 13, 14, 15, 15, 15, 15, 15, 15)),
    }


def _draw_glasgow(rng: random.Random) -> dict:
    return {"eyes": rng.choice(list(EYES)), "verbal": rng.choice(list(VERBAL)), "motor": rng.choice(list(MOTOR))}


def _draw_child_pugh(rng: random.Random) -> dict:
    return {
        "bilirubin": _tenths(rng, 0.6, 5.5),
        "albumin": _tenths(rng, 1.8, 4.6),
        "prothrombin time": rng.randint(1, 10),
        "ascites": rng.choice(list(ASCITES)),
        "encephalopathy": rng.choice(("none", "none", "grade 1", "grade 2", "grade 3", "grade 4")),
    }


def _draw_news2(rng: random.Random) -> dict:
    return {
        "respiratory rate": rng.randint(6, 34),
        "saturation": rng.randint(87, 99),
        "oxygen": rng.random() < 0.4,
        "systolic pressure": rng.randint(82, 128) if rng.random() < 0.7 else rng.randint(129, 232),
        "pulse": rng.randint(36, 140),
        "consciousness": rng.choice(("alert", "alert", "confused", "voice", "pain", "unresponsive")),
        "temperature": _tenths(rng, 34.4, 40.2),
    }


# What a finding reads like in a question: templates for a number, or for each value its phrases.
WORDS = {
    "age": ("aged {}", "{} years old", "age {}"),
    "respiratory rate": ("respiratory rate {}", "breathing rate {} per minute", "RR {}/min"),
    "systolic pressure": ("systolic pressure {}", "systolic BP {} mmHg", "SBP {}"),
    "blood pressure": ("blood pressure {}/{}", "BP {}/{} mmHg", "pressure {}/{}"),
    "urea nitrogen": ("urea nitrogen {}", "BUN {} mg/dL", "blood urea nitrogen {} mg/dL"),
    "coma score": ("coma score {}", "GCS {}", "Glasgow score {}"),
    "bilirubin": ("bilirubin {}", "bilirubin {} mg/dL", "total bilirubin {}"),
    "albumin": ("albumin {}", "albumin {} g/dL", "serum albumin {}"),
    "prothrombin time": ("prothrombin time +{} s", "PT {} s above control", "prothrombin time {} s over control"),
    "saturation": ("saturation {}%", "SpO2 {}%", "oxygen saturation {}%"),
    "pulse": ("pulse {}", "heart rate {}", "HR {}/min"),
    "temperature": ("temperature {}", "temp {} C", "body temperature {}"),
    "pH": ("pH {}", "arterial pH {}", "pH of {}"),
    "pCO2": ("pCO2 {}", "PaCO2 {} mmHg", "carbon dioxide {} mmHg"),
    "bicarbonate": ("bicarbonate {}", "HCO3 {} mmol/L", "bicarbonate of {}"),
    "confusion": {
        True: ("new confusion", "confused", "disoriented"),
        False: ("no confusion", "not confused", "well oriented"),
    },
    "heart failure": {True: ("heart failure", "has CHF"), False: ("no heart failure", "no CHF")},
    "hypertension": {
        True: ("hypertension", "treated high blood pressure"),
        False: ("no hypertension", "never hypertensive"),
    },
    "diabetes": {True: ("diabetes", "diabetic"), False: ("no diabetes", "not diabetic")},
    "stroke": {True: ("previous stroke", "earlier TIA"), False: ("no stroke", "never a stroke or TIA")},
    "vascular disease": {
        True: ("vascular disease", "old myocardial infarction"),
        False: ("no vascular disease", "healthy arteries"),
    },
    "female": {True: ("woman", "female"), False: ("man", "male")},
    "oxygen": {True: ("on oxygen", "breathing oxygen by mask"), False: ("on room air", "breathing air")},
    "consciousness": {
        "alert": ("alert", "fully alert"),
        "confused": ("newly confused", "new confusion"),
        "voice": ("responds to voice", "wakes to voice only"),
        "pain": ("responds to pain", "wakes to pain only"),
        "unresponsive": ("unresponsive", "does not respond"),
    },
    "eyes": {
        "none": ("eyes stay closed", "no eye opening"),
        "to pain": ("eyes open to pain", "opens eyes to pressure"),
        "to speech": ("eyes open to speech", "opens eyes when called"),
        "spontaneous": ("eyes open spontaneously", "eyes open by themselves"),
    },
    "verbal": {
        "none": ("no sound", "silent"),
        "sounds": ("only sounds", "moans"),
        "words": ("single words", "inappropriate words"),
        "confused": ("confused speech", "confused conversation"),
        "oriented": ("oriented speech", "talks sensibly"),
    },
    "motor": {
        "none": ("no movement", "limbs do not move"),
        "extension": ("arms extend to pain", "extensor response"),
        "flexion": ("abnormal flexion", "stiff flexion to pain"),
        "withdrawal": ("withdraws from pain", "pulls away from pain"),
        "localising": ("localises pain", "reaches for the pain"),
        "obeying": ("obeys commands", "moves as asked"),
    },
    "ascites": {
        "none": ("no ascites", "ascites absent"),
        "mild": ("mild ascites", "slight ascites"),
        "severe": ("severe ascites", "tense ascites"),
    },
    "encephalopathy": {
        "none": ("no encephalopathy", "encephalopathy absent"),
        **{f"grade {n}": (f"encephalopathy grade {n}", f"grade {n} encephalopathy") for n in (1, 2, 3, 4)},
    },
}

DISTRACTORS = (  # irrelevant to every rule above; a range gives the number
    ("weight {} kg", 48, 110),
    ("height {} cm", 150, 195),
    ("shoe size {}", 36, 46),
    ("platelets {}", 120, 390),
    ("sodium {}", 132, 146),
    ("haemoglobin {}", 90, 160),
    ("lives on floor {}", 1, 9),
    ("has {} cats", 2, 5),
    ("drinks tea", 0, 0),
    ("wears glasses", 0, 0),
    ("retired teacher", 0, 0),
    ("allergic to nuts", 0, 0),
)


def phrase(rng: random.Random, name: str, value: object) -> str:
    """One finding in one of its wordings."""
    words = WORDS[name]
    if isinstance(words, dict):
        return rng.choice(words[value])
    return rng.choice(words).format(*(value if isinstance(value, tuple) else (value,)))


def vignette(rng: random.Random, family: "Family", findings: dict) -> str:
    """The findings in any order with one to three irrelevant ones among them, as a few words of a chart."""
    parts = [phrase(rng, name, value) for name, value in findings.items()]
    for words, low, high in rng.sample(DISTRACTORS, rng.randint(1, 3)):
        parts.append(words.format(rng.randint(low, high)))
    rng.shuffle(parts)
    return f"{rng.choice(family.openings)}: {rng.choice((', ', '; ')).join(parts)}."


# --- the families ------------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A rule, its findings, and the words around them. `bands` are (highest total, meaning); empty for the blood gas.

    `alarm` is (points, meaning): what the lowest band means instead when a single criterion gives so many.
    """

    rule: Callable[[dict], list]
    draw: Callable[[random.Random], dict]
    openings: tuple[str, ...]
    asks: tuple[str, ...]
    lowest: int = 0
    bands: tuple[tuple[int, str], ...] = ()
    alarm: tuple[int, str] | None = None


FAMILIES = {
    "CURB-65": Family(
        curb65,
        _draw_curb65,
        ("Pneumonia", "Chest infection", "Patient with pneumonia"),
        ("What is the CURB-65 score?", "Give the CURB-65.", "How high is CURB-65?"),
        bands=((1, "low risk"), (2, "intermediate risk"), (5, "severe pneumonia")),
    ),
    "CHA2DS2-VASc": Family(
        cha2ds2_vasc,
        _draw_cha2ds2_vasc,
        ("Atrial fibrillation", "Patient with atrial fibrillation", "Irregular pulse, atrial fibrillation"),
        ("What is the CHA2DS2-VASc score?", "Give the CHA2DS2-VASc.", "How high is CHA2DS2-VASc?"),
        bands=((0, "low stroke risk"), (1, "intermediate stroke risk"), (9, "high stroke risk")),
    ),
    "qSOFA": Family(
        qsofa,
        _draw_qsofa,
        ("Suspected infection", "Patient with fever", "Possible sepsis"),
        ("What is the qSOFA score?", "Give the qSOFA.", "How high is qSOFA?"),
        bands=((1, "negative screen"), (3, "positive screen for sepsis")),
    ),
    "Glasgow coma": Family(
        glasgow,
        _draw_glasgow,
        ("Head injury", "After a fall", "Patient with head injury"),
        ("What is the Glasgow coma score?", "Give the Glasgow coma score.", "How high is the Glasgow coma score?"),
        lowest=3,
        bands=((8, "severe band"), (12, "moderate band"), (15, "mild band")),
    ),
    "Child-Pugh": Family(
        child_pugh,
        _draw_child_pugh,
        ("Cirrhosis", "Patient with cirrhosis", "Chronic liver disease"),
        ("What is the Child-Pugh score?", "Give the Child-Pugh score.", "How high is Child-Pugh?"),
        lowest=5,
        bands=((6, "class A"), (9, "class B"), (15, "class C")),
    ),
    "NEWS2": Family(
        news2,
        _draw_news2,
        ("Ward round", "Acute illness", "Patient on the ward"),
        ("What is the NEWS2 score?", "Give the NEWS2.", "How high is NEWS2?"),
        bands=((4, "low clinical risk"), (6, "medium clinical risk"), (20, "high clinical risk")),
        alarm=(3, "low-medium clinical risk"),
    ),
    "acid-base": Family(
        acid_base,
        _blood_gas,
        ("Blood gas", "Arterial blood gas", "Gas on arrival"),
        ("What is the acid-base status?", "Read the blood gas.", "Which acid-base disorder is this?"),
    ),
}
SCORED = tuple(name for name, family in FAMILIES.items() if family.bands)


def is_held_out(family: str, findings: dict) -> bool:
    """Whether these findings belong to evaluation; the same for every wording, seed and question asked about them."""
    key = repr((family, sorted(findings.items())))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def draw_findings(rng: random.Random, family: str, held_out: bool) -> dict:
    """Findings of one invented patient from the asked side of the split."""
    while True:
        findings = FAMILIES[family].draw(rng)
        if is_held_out(family, findings) == held_out:
            return findings


def answers(family: str) -> list[str]:
    """Every answer that can be right in a family, in order."""
    if family == SINGLE_STEP:
        return [points_phrase(points) for points in range(7)]
    if family == "acid-base":
        return list(DISORDERS.values())
    spec = FAMILIES[family]
    return [f"{_score_name(family)} of {total}" for total in range(spec.lowest, spec.bands[-1][0] + 1)]


def _score_name(family: str) -> str:
    return f"{family} score"


def reason(family: str, findings: dict) -> tuple[str, str, str]:
    """(Complex_CoT, Response, answer) of one set of findings: one criterion a line, the conclusion on the last."""
    spec = FAMILIES[family]
    if family == "acid-base":
        read = spec.rule(findings)
        answer = DISORDERS[tuple(state for _, state in read)]
        return "\n".join([line for line, _ in read] + [f"conclusion: {answer}"]), f"This is {answer}.", answer
    lines, total, steps = [], 0, spec.rule(findings)
    for step in steps:
        total += step.points
        lines.append(f"{step.line()}, total {total}")
    meaning = meaning_of(spec, total, max(step.points for step in steps))
    answer = f"{_score_name(family)} of {total}"
    return "\n".join([*lines, f"{family} total {total}: {meaning}"]), f"This is a {answer}, {meaning}.", answer


def meaning_of(spec: "Family", total: int, highest_step: int = 0) -> str:
    """What a total means, where its highest criterion gives `highest_step` points."""
    if spec.alarm and total <= spec.bands[0][0] and highest_step >= spec.alarm[0]:
        return spec.alarm[1]
    return next(words for highest, words in spec.bands if total <= highest)


def _choices(rng: random.Random, family: str, answer: str) -> dict:
    """The answer among three others of its family that lie near it."""
    known = answers(family)
    place = known.index(answer)
    near = [other for other in known[max(0, place - 4) : place + 5] if other != answer]
    choices = rng.sample(near, 3) + [answer]
    rng.shuffle(choices)
    return {"choices": choices, "answer_index": choices.index(answer)}


def make_row(rng: random.Random, family: str, held_out: bool) -> dict:
    """One row of the asked side: Question, Complex_CoT, Response, family, answer, choices and answer_index."""
    return _make_row(rng, family, held_out)[0]


def _make_row(rng: random.Random, family: str, held_out: bool) -> tuple[dict, str]:
    """A row, and what is asked in it whatever the wording: rule, findings, and the criterion of a single step."""
    rule = rng.choice(SCORED) if family == SINGLE_STEP else family
    findings = draw_findings(rng, rule, held_out)
    text, asked = vignette(rng, FAMILIES[rule], findings), repr((family, rule, sorted(findings.items())))
    if family == SINGLE_STEP:
        step = rng.choice(FAMILIES[rule].rule(findings))
        asked += f" {step.name}"
        answer = points_phrase(step.points)
        row = {
            "Question": f"{text} How many {rule} points for {step.name}?",
            "Complex_CoT": step.line(),
            "Response": f"This gives {answer}.",
        }
    else:
        reasoning, response, answer = reason(family, findings)
        row = {
            "Question": f"{text} {rng.choice(FAMILIES[family].asks)}",
            "Complex_CoT": reasoning,
            "Response": response,
        }
    return row | {"family": family, "answer": answer} | _choices(rng, family, answer), asked


_REDRAWS = 300  # after so many without a new case a family has none left: the smallest has 30 held-out ones


def _rows(count: int, seed: int, held_out: bool) -> list[dict]:
    """`count` rows with different questions, families in turn."""
    rng = random.Random(f"{seed} {'held out' if held_out else 'training'}")
    families = (*FAMILIES, SINGLE_STEP)
    rows, questions, cases = [], set(), set()
    while len(rows) < count:
        family = families[len(rows) % len(families)]
        row, asked = _make_row(rng, family, held_out)
        if held_out and asked in cases:  # another case in its place, so that the rows after it stay as they are
            row, asked = _new_case(random.Random(f"{seed} again {len(rows)}"), family, cases) or (row, asked)
        if row["Question"] not in questions:
            questions.add(row["Question"])
            cases.add(asked)
            rows.append(row)
    return rows


def _new_case(rng: random.Random, family: str, cases: set[str]) -> tuple[dict, str] | None:
    """A held-out row that asks none of `cases`; None where the family has no other."""
    drawn = (_make_row(rng, family, True) for _ in range(_REDRAWS))
    return next((row for row in drawn if row[1] not in cases), None)


def training_cases(rows: int, seed: int) -> list[dict]:
    """`rows` rows to learn from, all families in turn, one in eight a single step that keeps what the base could do."""
    return _rows(rows, seed, held_out=False)


def held_out_cases(rows: int, seed: int) -> list[dict]:
    """`rows` rows to measure on, all families in turn; their findings never stand in training.

    No case is asked twice in other words until a family has no other left (Glasgow coma, after 30 of its own).
    """
    return _rows(rows, seed, held_out=True)
