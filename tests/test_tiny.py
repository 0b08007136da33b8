"""The embedded default: the rules, the split, the reasoning, the base model's folder and the script that makes it."""

import bisect
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.tiny import build, cases

MODEL = Path(cases.__file__).parent / "model"
FAMILIES = (*cases.FAMILIES, cases.SINGLE_STEP)


# --- a second implementation of every rule, table-driven: cut points and the points between them --------------------


def between(value, cuts, points):
    """`points[i]` where i is the number of `cuts` that `value` has reached; one more entry than cuts."""
    return points[bisect.bisect_right(cuts, value)]


def curb65(f):
    systolic, diastolic = f["blood pressure"]
    pressure = 1 if between(systolic, [90], [1, 0]) or between(diastolic, [61], [1, 0]) else 0
    urea, breaths = between(f["urea nitrogen"], [20], [0, 1]), between(f["respiratory rate"], [30], [0, 1])
    return int(f["confusion"]) + urea + breaths + pressure + between(f["age"], [65], [0, 1])


def cha2ds2_vasc(f):
    weights = {"heart failure": 1, "hypertension": 1, "diabetes": 1, "stroke": 2, "vascular disease": 1, "female": 1}
    return between(f["age"], [65, 75], [0, 1, 2]) + sum(weight for name, weight in weights.items() if f[name])


def qsofa(f):
    return (
        between(f["respiratory rate"], [22], [0, 1])
        + between(f["systolic pressure"], [101], [1, 0])
        + between(f["coma score"], [15], [1, 0])
    )


def glasgow(f):
    eyes = ["none", "to pain", "to speech", "spontaneous"]
    verbal = ["none", "sounds", "words", "confused", "oriented"]
    motor = ["none", "extension", "flexion", "withdrawal", "localising", "obeying"]
    return eyes.index(f["eyes"]) + verbal.index(f["verbal"]) + motor.index(f["motor"]) + 3


def child_pugh(f):
    tenths = {
        name: round(f[name] * 10) for name in ("bilirubin", "albumin")
    }  # whole numbers: no rounding at the limits
    return (
        between(tenths["bilirubin"], [20, 31], [1, 2, 3])
        + between(tenths["albumin"], [28, 36], [3, 2, 1])
        + between(f["prothrombin time"], [4, 7], [1, 2, 3])
        + {"none": 1, "mild": 2, "severe": 3}[f["ascites"]]
        + {"none": 1, "grade 1": 2, "grade 2": 2, "grade 3": 3, "grade 4": 3}[f["encephalopathy"]]
    )


def news2(f):
    return (
        between(f["respiratory rate"], [9, 12, 21, 25], [3, 1, 0, 2, 3])
        + between(f["saturation"], [92, 94, 96], [3, 2, 1, 0])
        + 2 * f["oxygen"]
        + between(f["systolic pressure"], [91, 101, 111, 220], [3, 2, 1, 0, 3])
        + between(f["pulse"], [41, 51, 91, 111, 131], [3, 1, 0, 1, 2, 3])
        + 3 * (f["consciousness"] != "alert")
        + between(round(f["temperature"] * 10), [351, 361, 381, 391], [3, 1, 0, 1, 2])
    )


def acid_base(f):
    """By cause: which of the two, pCO2 or bicarbonate, moves the pH the way it went; the other one compensates."""
    acid = f["pH"] < 7.35
    if not acid and f["pH"] <= 7.45:
        return "normal acid-base status"
    word = "acidosis" if acid else "alkalosis"
    carbon = f["pCO2"] > 45 if acid else f["pCO2"] < 35  # respiratory cause
    base = f["bicarbonate"] < 22 if acid else f["bicarbonate"] > 26  # metabolic cause
    if carbon and base:
        return f"mixed {word}"
    compensating = not (35 <= f["pCO2"] <= 45) if base else not (22 <= f["bicarbonate"] <= 26)
    return (
        f"{'partly compensated' if compensating else 'uncompensated'} {'metabolic' if base else 'respiratory'} {word}"
    )


SECOND = {
    "CURB-65": curb65,
    "CHA2DS2-VASc": cha2ds2_vasc,
    "qSOFA": qsofa,
    "Glasgow coma": glasgow,
    "Child-Pugh": child_pugh,
    "NEWS2": news2,
    "acid-base": acid_base,
}


def expected_answer(family, findings):
    result = SECOND[family](findings)
    return result if family == "acid-base" else f"{family} score of {result}"


@pytest.mark.parametrize("family", cases.FAMILIES)
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_rule_agrees_with_the_second_implementation(family, seed):
    findings = cases.FAMILIES[family].draw(random.Random(seed))
    assert cases.reason(family, findings)[2] == expected_answer(family, findings)


def changed(base, **changes):
    return base | {name.replace("_", " "): value for name, value in changes.items()}


CURB = {"confusion": False, "urea nitrogen": 19, "respiratory rate": 29, "blood pressure": (90, 61), "age": 64}
CHADS = dict.fromkeys(("heart failure", "hypertension", "diabetes", "stroke", "vascular disease", "female"), False) | {
    "age": 64
}
SOFA = {"respiratory rate": 21, "systolic pressure": 101, "coma score": 15}
PUGH = {"bilirubin": 1.9, "albumin": 3.6, "prothrombin time": 3, "ascites": "none", "encephalopathy": "none"}
WELL = {
    "respiratory rate": 16,
    "saturation": 97,
    "oxygen": False,
    "systolic pressure": 120,
    "pulse": 72,
    "consciousness": "alert",
    "temperature": 37.0,
}


@pytest.mark.parametrize(
    ("family", "findings", "total"),
    [
        ("CURB-65", CURB, 0),
        ("CURB-65", changed(CURB, urea_nitrogen=20), 1),
        ("CURB-65", changed(CURB, respiratory_rate=30), 1),
        ("CURB-65", changed(CURB, blood_pressure=(89, 61)), 1),
        ("CURB-65", changed(CURB, blood_pressure=(90, 60)), 1),
        ("CURB-65", changed(CURB, blood_pressure=(89, 60)), 1),  # either or both: one point
        ("CURB-65", changed(CURB, age=65), 1),
        ("CHA2DS2-VASc", CHADS, 0),
        ("CHA2DS2-VASc", changed(CHADS, age=65), 1),
        ("CHA2DS2-VASc", changed(CHADS, age=74), 1),
        ("CHA2DS2-VASc", changed(CHADS, age=75), 2),
        ("CHA2DS2-VASc", changed(CHADS, stroke=True), 2),
        ("CHA2DS2-VASc", changed(dict.fromkeys(CHADS, True), age=80), 9),  # the highest score of Lip 2010
        ("qSOFA", SOFA, 0),
        ("qSOFA", changed(SOFA, respiratory_rate=22), 1),
        ("qSOFA", changed(SOFA, systolic_pressure=100), 1),
        ("qSOFA", changed(SOFA, coma_score=14), 1),
        ("Glasgow coma", {"eyes": "none", "verbal": "none", "motor": "none"}, 3),  # the lowest and highest of 1974/1979
        ("Glasgow coma", {"eyes": "spontaneous", "verbal": "oriented", "motor": "obeying"}, 15),
        ("Glasgow coma", {"eyes": "to pain", "verbal": "sounds", "motor": "withdrawal"}, 8),
        ("Child-Pugh", PUGH, 5),
        ("Child-Pugh", changed(PUGH, bilirubin=2.0), 6),
        ("Child-Pugh", changed(PUGH, bilirubin=3.0), 6),
        ("Child-Pugh", changed(PUGH, bilirubin=3.1), 7),
        ("Child-Pugh", changed(PUGH, albumin=3.5), 6),
        ("Child-Pugh", changed(PUGH, albumin=2.8), 6),
        ("Child-Pugh", changed(PUGH, albumin=2.7), 7),
        ("Child-Pugh", changed(PUGH, prothrombin_time=4), 6),
        ("Child-Pugh", changed(PUGH, prothrombin_time=6), 6),
        ("Child-Pugh", changed(PUGH, prothrombin_time=7), 7),
        ("Child-Pugh", changed(PUGH, encephalopathy="grade 2", ascites="mild"), 7),
        ("Child-Pugh", changed(PUGH, encephalopathy="grade 3", ascites="severe"), 9),
        ("NEWS2", WELL, 0),
        # The worst reading of every parameter on the chart: 3 + 3 + 2 + 3 + 3 + 3 + 3.
        ("NEWS2", changed(WELL, respiratory_rate=25, saturation=91, oxygen=True, systolic_pressure=90, pulse=131,
                          consciousness="voice", temperature=35.0), 20),
        *[("NEWS2", changed(WELL, respiratory_rate=rate), points)
          for rate, points in ((8, 3), (9, 1), (11, 1), (12, 0), (20, 0), (21, 2), (24, 2), (25, 3))],
        *[("NEWS2", changed(WELL, saturation=percent), points)
          for percent, points in ((91, 3), (92, 2), (93, 2), (94, 1), (95, 1), (96, 0))],
        *[("NEWS2", changed(WELL, systolic_pressure=mmhg), points)
          for mmhg, points in ((90, 3), (91, 2), (100, 2), (101, 1), (110, 1), (111, 0), (219, 0), (220, 3))],
        *[("NEWS2", changed(WELL, pulse=rate), points)
          for rate, points in ((40, 3), (41, 1), (50, 1), (51, 0), (90, 0), (91, 1), (110, 1), (111, 2), (130, 2), (131, 3))],
        *[("NEWS2", changed(WELL, temperature=degrees), points)
          for degrees, points in ((35.0, 3), (35.1, 1), (36.0, 1), (36.1, 0), (38.0, 0), (38.1, 1), (39.0, 1), (39.1, 2))],
    ],
)  # fmt: skip
def test_totals_at_the_limits_that_the_papers_print(family, findings, total):
    assert cases.reason(family, findings)[2] == f"{family} score of {total}"


@pytest.mark.parametrize(
    ("ph", "pco2", "bicarbonate", "disorder"),
    [  # textbook gases: pH, pCO2 mmHg, bicarbonate mmol/L
        (7.40, 40, 24, "normal acid-base status"),
        (7.35, 45, 24, "normal acid-base status"),
        (7.25, 29, 12, "partly compensated metabolic acidosis"),
        (7.29, 36, 17, "uncompensated metabolic acidosis"),
        (7.22, 60, 24, "uncompensated respiratory acidosis"),
        (7.30, 64, 31, "partly compensated respiratory acidosis"),
        (7.10, 55, 17, "mixed acidosis"),
        (7.52, 40, 32, "uncompensated metabolic alkalosis"),
        (7.48, 48, 35, "partly compensated metabolic alkalosis"),
        (7.55, 28, 24, "uncompensated respiratory alkalosis"),
        (7.47, 25, 18, "partly compensated respiratory alkalosis"),
        (7.62, 30, 30, "mixed alkalosis"),
    ],
)
def test_blood_gases_with_known_reading(ph, pco2, bicarbonate, disorder):
    assert cases.reason("acid-base", {"pH": ph, "pCO2": pco2, "bicarbonate": bicarbonate})[2] == disorder


def test_drawn_gases_obey_henderson_and_hasselbalch():
    for seed in range(200):
        gas = cases.FAMILIES["acid-base"].draw(random.Random(seed))
        hydrogen = 24 * gas["pCO2"] / gas["bicarbonate"]  # nmol/L, the other form of the equation
        assert 10 ** (9 - gas["pH"]) == pytest.approx(hydrogen, rel=0.03)


@pytest.mark.parametrize(
    ("family", "total", "meaning"),
    [
        *[
            ("Glasgow coma", total, band)
            for total, band in ((8, "severe"), (9, "moderate"), (12, "moderate"), (13, "mild"))
        ],
        *[("Child-Pugh", total, f"class {band}") for total, band in ((6, "A"), (7, "B"), (9, "B"), (10, "C"))],
        *[("CURB-65", total, band) for total, band in ((1, "low"), (2, "intermediate"), (3, "severe"))],
        *[("NEWS2", total, band) for total, band in ((4, "low"), (5, "medium"), (6, "medium"), (7, "high"))],
        *[("qSOFA", total, band) for total, band in ((1, "negative"), (2, "positive"))],
        *[("CHA2DS2-VASc", total, band) for total, band in ((0, "low"), (1, "intermediate"), (2, "high"))],
    ],
)
def test_bands_as_published(family, total, meaning):
    assert next(words for highest, words in cases.FAMILIES[family].bands if total <= highest).startswith(meaning)


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [  # NICE, medtech innovation briefing 205 (2020): low to medium risk is a score of 3 in any single parameter
        ({"pulse": 91}, "low"),
        ({"pulse": 111, "temperature": 39.1}, "low"),  # 4 of two criteria
        ({"systolic_pressure": 90}, "low-medium"),
        ({"consciousness": "confused"}, "low-medium"),
        ({"respiratory_rate": 8, "pulse": 91}, "low-medium"),  # 3 + 1
        ({"respiratory_rate": 8, "oxygen": True}, "medium"),  # 3 + 2: the total decides from 5
        ({"respiratory_rate": 25, "saturation": 91, "pulse": 91}, "high"),
    ],
)
def test_a_single_3_in_news2_is_low_medium(changes, meaning):
    reasoning, response, _ = cases.reason("NEWS2", changed(WELL, **changes))
    assert response.endswith(f", {meaning} clinical risk.") and reasoning.endswith(f": {meaning} clinical risk")


# --- rows ------------------------------------------------------------------------------------------------------------


def whole_words(phrase, text):
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


@pytest.fixture(scope="module")
def rows():
    return cases.training_cases(800, seed=1) + cases.held_out_cases(800, seed=1)


def test_rows_are_balanced_and_differ(rows):
    assert {family: sum(row["family"] == family for row in rows) for family in FAMILIES} == dict.fromkeys(FAMILIES, 200)
    assert len({row["Question"] for row in rows}) == len(rows)


def test_response_names_its_answer_and_no_other(rows):
    for row in rows:
        named = [answer for answer in cases.answers(row["family"]) if whole_words(answer, row["Response"])]
        assert named == [row["answer"]]
        assert len(set(row["choices"])) == 4 and row["choices"][row["answer_index"]] == row["answer"]
        assert set(row["choices"]) <= set(cases.answers(row["family"]))


def test_every_answer_of_a_family_has_one_sentence(rows):
    sentences = {}
    for row in rows:
        sentences.setdefault((row["family"], row["answer"]), set()).add(row["Response"])
    several = {answer: each for answer, each in sentences.items() if len(each) > 1}
    assert several.keys() <= {("NEWS2", "NEWS2 score of 3"), ("NEWS2", "NEWS2 score of 4")}  # low or low-medium


def test_running_totals_add_up_to_the_conclusion(rows):
    for row in rows:
        if row["family"] in ("acid-base", cases.SINGLE_STEP):
            continue
        *lines, last = row["Complex_CoT"].splitlines()
        total = 0
        for line in lines:
            points, running = map(int, re.fullmatch(r".+: (\d+) points?, total (\d+)", line).groups())
            total += points
            assert running == total
        assert last.startswith(f"{row['family']} total {total}: ") and row["answer"].endswith(f" {total}")


def test_comparisons_in_the_reasoning_hold(rows):
    for row in rows:
        for left, sign, right in re.findall(r"([\d.]+) (?:systolic |diastolic )?([<>]=?) ([\d.]+)", row["Complex_CoT"]):
            assert cases.COMPARE[sign](float(left), float(right)), row["Complex_CoT"]


def test_numbers_of_the_reasoning_stand_in_the_question(rows):
    for row in rows:
        for line in row["Complex_CoT"].splitlines():
            value = re.match(r"[A-Za-z0-9 ]*? (\d[\d./]*) (?:[<>]|within|systolic|diastolic)", line)
            assert value is None or value[1] in row["Question"]


def test_rows_are_deterministic_and_serialisable(rows):
    assert cases.training_cases(80, 7) == cases.training_cases(80, 7) != cases.training_cases(80, 8)
    assert cases.held_out_cases(80, 7) == cases.held_out_cases(80, 7)
    assert json.loads(json.dumps(rows)) == rows


# --- the split ---------------------------------------------------------------------------------------------------------


def spy_on_draws(monkeypatch):
    """Records (family, findings) of every vignette that is put into words."""
    seen, original = [], cases.vignette

    def vignette(rng, family, findings):
        name = next(name for name, known in cases.FAMILIES.items() if known is family)
        seen.append((name, repr(sorted(findings.items()))))
        return original(rng, family, findings)

    monkeypatch.setattr(cases, "vignette", vignette)
    return seen


def test_held_out_findings_never_stand_in_training_or_pretraining(monkeypatch):
    seen = spy_on_draws(monkeypatch)
    for seed in range(20):
        cases.held_out_cases(240, seed)
    held_out = set(seen)
    seen.clear()
    for seed in range(20):
        cases.training_cases(400, seed)
    trained = set(seen)
    seen.clear()
    rng = random.Random(0)
    for _ in range(4000):
        build.pretraining_row(rng)
    assert len(held_out) > 2000 and len(trained) > 3000 and len(seen) > 2000
    assert not held_out & trained
    assert not held_out & set(seen)


def test_no_held_out_case_is_asked_twice_in_other_words(monkeypatch):
    drawn, original = [], cases._make_row
    monkeypatch.setattr(cases, "_make_row", lambda *args: drawn.append(original(*args)) or drawn[-1])
    for seed in (20260101, 1, 2):
        drawn.clear()
        rows = cases.held_out_cases(240, seed)
        asked = {row["Question"]: case for row, case in drawn}
        seen = [asked[row["Question"]] for row in rows]
        assert len(set(seen)) == 240
        assert sum("Glasgow" in row["family"] for row in rows) == 30
    # When a family has no other case left, it asks one again rather than none.
    assert len(cases.held_out_cases(400, seed=1)) == 400


def test_wording_does_not_move_a_case_across_the_split():
    findings = {"eyes": "none", "verbal": "words", "motor": "obeying"}
    side = cases.is_held_out("Glasgow coma", findings)
    assert cases.is_held_out("Glasgow coma", dict(reversed(findings.items()))) == side
    assert sum(
        cases.is_held_out("Glasgow coma", {"eyes": e, "verbal": v, "motor": m})
        for e in cases.EYES
        for v in cases.VERBAL
        for m in cases.MOTOR
    ) == pytest.approx(120 / cases.HELD_OUT_ONE_IN, abs=12)


def test_pretraining_never_shows_the_reasoning_format():
    rng = random.Random(5)
    for _ in range(3000):
        context, learnt, _ = build.pretraining_row(rng)
        assert not re.search(r"points?, total \d", context + learnt)
        if build.THINK in context:
            assert learnt.startswith(f"\n{build.END_THINK}\n") and learnt.endswith(build.EOS)


def test_cases_import_without_heavy_libraries():
    code = (
        "import sys, medcot.tiny.cases; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    root = Path(cases.__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


# --- the model's folder ------------------------------------------------------------------------------------------------


def test_folder_is_small_and_complete():
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"special_tokens_map.json", "README.md"}
    assert names <= {path.name for path in MODEL.iterdir()}
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 10_000_000


def test_model_has_at_most_five_million_parameters_that_nf4_can_block():
    from safetensors import safe_open

    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (not a dict)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) <= 5_000_000
    assert all(side % 64 == 0 for name, shape in shapes.items() if name.endswith("proj.weight") for side in shape)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_tokenizer_contract(tokenizer):
    from medcot.prompts import format_prompt

    assert json.loads((MODEL / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = tokenizer(format_prompt("chest pain, RR 22/min?")).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == format_prompt("chest pain, RR 22/min?")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.model_max_length == 2048
    for text in (build.USER, build.ASSISTANT, build.THINK, build.END_THINK):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1
    assert len(tokenizer("1234.5", add_special_tokens=False).input_ids) == 6


def test_chat_template_keeps_the_reasoning(tokenizer):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<think>\na\n</think>\nb"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == f"{build.BOS}{build.USER}Hello{build.ASSISTANT}<think>\na\n</think>\nb{build.EOS}"
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True).endswith("<think>\n")


def test_tokenizer_in_the_folder_is_the_one_the_script_makes(tokenizer):
    assert build.build_tokenizer(3407).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_script_is_deterministic(tmp_path):
    shape = build.SHAPE | {"num_hidden_layers": 1}
    for name in ("first", "second"):
        build.build(tmp_path / name, seed=11, steps=3, rows=4, shape=shape)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert written[0] == written[1]
