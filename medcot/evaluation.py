"""Grading and paired statistics; no model in here."""

import hashlib
import json
import math
import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from .data import normalise, read_hub
from .settings import EMBEDDED_CASES, HELD_OUT_SEED, MedcotError

LEVEL, POWER = 0.95, 0.8
NEAR = 95  # rapidfuzz ratio, 0 to 100, from which two questions count as nearly the same
RESAMPLES = 9999
UNCHANGED = "no detectable difference"


# --- multiple-choice questions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions and where they came from."""

    rows: tuple[dict, ...]
    """One a question: `question` (text), `choices` (list of texts), `answer_index` (0 is the first choice)."""
    source: str
    revision: str | None
    fingerprint: str
    """SHA-256 over questions, choices and answers, in order."""

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        revision = f" at {self.revision}" if self.revision else ""
        return f"{len(self)} multiple-choice questions from {self.source}{revision}; SHA-256 {self.fingerprint[:12]}"


def load_choices(settings) -> Questions:
    """The first `choice_rows` multiple-choice questions of `choice_dataset`, checked; one line says what was loaded.

    Read are the columns `question`, `choices` or `options` (a list, or a letter for each text) and `answer_index`,
    `answer_idx` or `answer` (an index from 0, a letter, or the right option's text); the test split of a hub data set,
    or the lines of a jsonl file. Raises MedcotError naming file and line for a row without one of them, with fewer than
    two choices, with an empty one or with an answer that is not among them.
    """
    path, revision = Path(settings.choice_dataset), None
    if settings.choice_dataset == EMBEDDED_CASES:
        from .tiny.cases import held_out_cases

        rows = [(f"case {i}", row) for i, row in enumerate(held_out_cases(settings.choice_rows, seed=HELD_OUT_SEED))]
    elif path.suffix == ".jsonl" or path.exists():
        rows = _read_lines(path, settings.choice_rows)
    else:
        table, revision = read_hub(settings, "choice_dataset", None, "test")
        rows = [(f"row {i} of its test split", row) for i, row in enumerate(table)]
    read = tuple(_question(row, f"{settings.choice_dataset}, {place}") for place, row in rows[: settings.choice_rows])
    if not read:
        raise MedcotError(f"{settings.choice_dataset} holds no question: name a file with at least one line")
    digest = hashlib.sha256(json.dumps(read, ensure_ascii=False).encode()).hexdigest()
    questions = Questions(read, settings.choice_dataset, revision, digest)
    print(questions)
    return questions


def _read_lines(path: Path, most: int) -> list[tuple[str, dict]]:
    if not path.is_file():
        raise MedcotError(f"{path.absolute()} not found: name a jsonl file of multiple-choice questions, or a hub name")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(rows) == most:
                break
            try:
                rows.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise MedcotError(f"{path}, line {number}: not a JSON object ({error}): mend or remove it") from error
    return rows


def _question(row, place: str) -> dict:
    """A row of any of the known forms as question, choices and answer_index; `place` names it in an error."""
    if not isinstance(row, dict):
        raise MedcotError(f"{place}: holds {type(row).__name__}, not an object with question, choices and answer")
    question = next((row[name] for name in ("question", "Question") if row.get(name)), None)
    choices = next((row[name] for name in ("choices", "options") if row.get(name)), None)
    answer = next((row[name] for name in ("answer_index", "answer_idx", "answer") if row.get(name) is not None), None)
    lacking = [name for name, v in {"question": question, "choices": choices, "answer": answer}.items() if v is None]
    if lacking:
        raise MedcotError(f"{place}: has no {', '.join(lacking)}; it has {', '.join(row)}: name its columns so")
    if isinstance(choices, dict):  # a table has a column for every letter any row uses, empty where this one does not
        choices = {letter: text for letter, text in choices.items() if text is not None}
    letters = sorted(choices) if isinstance(choices, dict) else [chr(ord("A") + i) for i in range(len(choices))]
    texts = [choices[letter] for letter in letters] if isinstance(choices, dict) else list(choices)
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise MedcotError(f"{place}: choices {texts!r}: at least two texts are needed, none of them empty")
    if isinstance(answer, str):
        known = letters if answer in letters else texts
        index = known.index(answer) if answer in known else -1
    else:
        index = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if not 0 <= index < len(texts):
        raise MedcotError(
            f"{place}: answer {answer!r} is out of range for its {len(texts)} choices: "
            "give an index from 0, a letter, or the text of one of them"
        )
    return {"question": question, "choices": texts, "answer_index": index}


# --- leaks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaks:
    """Evaluation questions that stand in the training rows, exactly or nearly; `compare` leaves them out."""

    checked: int
    exact: tuple[str, ...]
    """Questions equal to a training question after normalisation."""
    near: tuple[tuple[str, str, float], ...]
    """(evaluation question, training question, similarity of at least 95 out of 100)."""

    @property
    def questions(self) -> set[str]:
        """The evaluation questions that leaked, normalised."""
        return {normalise(question) for question in (*self.exact, *(question for question, *_ in self.near))}

    def __str__(self):
        lines = [
            f"{self.checked} evaluation questions against the training rows: {len(self.exact)} stand there exactly and "
            f"{len(self.near)} nearly (similarity of {NEAR} or more out of 100)"
            + ("; they are left out of the comparison" if self.exact or self.near else "")
        ]
        lines += [f"  exact: {textwrap.shorten(question, 150)}" for question in self.exact]
        for question, training, similarity in self.near:
            lines += [f"  {similarity:.0f}: {textwrap.shorten(question, 150)}"]
            lines += [f"      in training: {textwrap.shorten(training, 150)}"]
        return "\n".join(lines)


def check_leaks(splits, questions: Questions | None = None) -> Leaks:
    """Looks for every evaluation and multiple-choice question among the training questions.

    Compared are normalised texts: equal, or a rapidfuzz ratio (1 - edit distance of insertions and deletions / summed
    length, in per cent) of at least 95.
    """
    from rapidfuzz import fuzz, process

    training = {normalise(question): question for question in splits.train["Question"]}
    asked = list(splits.eval["Question"]) + [row["question"] for row in (questions.rows if questions else ())]
    asked = {normalise(question): question for question in asked}
    exact = tuple(question for key, question in asked.items() if key in training)
    near = []
    for key, question in asked.items():
        if key in training:
            continue
        found = process.extractOne(key, training.keys(), scorer=fuzz.ratio, score_cutoff=NEAR)
        if found:
            near.append((question, training[found[0]], found[1]))
    return Leaks(len(asked), exact, tuple(near))


# --- grading -----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"[^\W_]+|[<>≤≥+%]|-(?=\d)")
# "The answer is (C)", "option C", "Answer: **C.**", "\boxed{C}", but not "the answer is a fracture" or "C. difficile".
_LETTER = re.compile(
    r"(?i:\b(?:answer|option|choice)s?\b[\s:*_]*(?:(?:is|would be|must be|should be|=)\b)?[\s:*_]*"
    r"(?:(?:therefore|thus|most likely|likely|option|choice)\b)?[\s:*_\"'(\[{$]*)(?:\\boxed\{)?(?:\\text\{)?"
    r"(?P<letter>[A-Z])(?![\w'’])(?!\.?[ \t]+(?!(?:is|because|since|as|which|and)\b)[a-z\d])"
    r"|\\boxed\{(?:\\text\{)?(?P<boxed>[A-Z])\b"
)
_LONE_LETTER = re.compile(r"^[\s*_(\[]*(?P<letter>[A-Z])[\s*_)\].:]*(?:$|(?<=[).:*])\s(?![a-z]))", re.MULTILINE)


def extract_choice(text: str, choices) -> int | None:
    """Index of the option that `text` chooses, None where it chooses none that can be told.

    Looked for in this order, and of each the last occurrence: a letter named as the answer; a line that starts with the
    only such letter; an option's text as whole words, ignoring case and punctuation (of overlapping ones the longest);
    an option's text of six characters or more, but for a slip of spelling (the same first four letters of every word,
    rapidfuzz ratio of at least 90).

    How far to trust it: 98 reference Responses of medical-o1-reasoning-SFT, written without the options in sight, name one
    of their question's options in 38; 27 of these are the gold option and 11 another (11 % of all, 29 % of those
    extracted): 2 because the Response itself differs from gold, 9 because it ends on an option that it argues against.
    """
    for pattern, alone in ((_LETTER, False), (_LONE_LETTER, True)):
        letters = [next(filter(None, m.groups())) for m in pattern.finditer(text)]
        letters = [letter for letter in letters if ord(letter) - ord("A") < len(choices)]
        if letters and not (alone and len(set(letters)) > 1):
            return ord(letters[-1]) - ord("A")
    words = _words(text)
    options = [_words(choice) for choice in choices]
    return _last(_verbatim(words, options) or _near(words, options))


def _words(text: str) -> str:
    return " ".join(_TOKEN.findall(text.casefold()))


def _verbatim(words: str, options) -> list[tuple[int, int, int]]:
    """(start, end, option) of every option's text in `words`, those inside a longer one left out."""
    found = [
        (m.start(), m.end(), i)
        for i, option in enumerate(options)
        # A lone letter as an option ("A" under a picture) is an article everywhere else.
        if len(option) > 1 or option.isdigit()
        for m in re.finditer(rf"(?<!\S){re.escape(option)}(?!\S)", words)
    ]
    inside = [a for a in found if any(b[0] <= a[0] and a[1] <= b[1] and b[1] - b[0] > a[1] - a[0] for b in found)]
    return [match for match in found if match not in inside]


def _near(words: str, options) -> list[tuple[int, int, int]]:
    """As `_verbatim`, for options that stand in `words` with a slip of spelling or another ending."""
    from rapidfuzz import fuzz

    text, found = words.split(), []
    for i, option in enumerate(options):
        wanted = option.split()
        for place in range(len(text) - len(wanted) + 1 if len(option) >= 6 else 0):
            window = text[place : place + len(wanted)]
            # The first letters of every word must agree (hyper- is not hypo-, irreversible not reversible), and numbers.
            if all(
                a[:4] == b[:4] and (a == b or not (a + b).isdigit()) for a, b in zip(window, wanted, strict=True)
            ) and (fuzz.ratio(" ".join(window), option) >= 90):
                found.append((place, place + len(wanted), i))
    return found


def _last(found) -> int | None:
    """The option that ends last; None if nothing was found or two different ones share that place."""
    last = max((match[1] for match in found), default=None)
    options = {option for _, end, option in found if end == last}
    return options.pop() if len(options) == 1 else None


@dataclass(frozen=True)
class Outcome:
    """How one answer did."""

    well_formed: bool
    """Think closed, response present, stopped by itself."""
    correct: bool | None
    """The right option was chosen, or the row's `answer` stands in the response as whole words; None without either."""
    steps_correct: bool | None
    """Every line of the reasoning equals the reference's; None for rows without a family, whose wording is free."""
    closed: bool = True
    """`</think>` was written."""
    stopped: bool = True
    """The model ended the answer by itself, within the limit."""
    answered: bool = True
    """Something stands after `</think>`."""
    extracted: bool | None = None
    """An option could be told from the response; None where rows carry no choices."""
    length: int = 0
    """Tokens written."""
    repetition: float = 0.0
    """Share of the text's 4-word sequences that had occurred before in it (seq-rep-4, Welleck et al. 2020), 0 to 1."""


def grade(row, answer) -> Outcome:
    """Grades one answer against its row. A response that was never reached or chooses nothing is wrong, not missing.

    Only what stands after the last `</think>` is read. Rows with `choices` and `answer_index` are graded by the option
    chosen (`extract_choice`), rows with an `answer` alone by that text.
    """
    parsed = answer.parsed
    correct = extracted = steps = None
    if row.get("choices"):
        chosen = extract_choice(parsed.response, row["choices"])
        correct, extracted = chosen == row["answer_index"], chosen is not None
    elif row.get("answer"):
        words = re.escape(normalise(row["answer"]))
        correct = re.search(rf"(?<!\w){words}(?!\w)", normalise(parsed.response)) is not None
    if row.get("answer") and row.get("family"):
        steps = _lines(parsed.reasoning) == _lines(row["Complex_CoT"])
    return Outcome(
        well_formed=not parsed.problems, correct=correct, steps_correct=steps,
        closed="think never closed" not in parsed.problems, stopped="no EOS within the limit" not in parsed.problems,
        answered=bool(parsed.response.strip()), extracted=extracted, length=answer.new_tokens,
        repetition=_repetition(f"{parsed.reasoning} {parsed.response}"),
    )  # fmt: skip


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _repetition(text: str, n: int = 4) -> float:
    words = text.split()
    sequences = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


# --- statistics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """One measure before and after, paired over the same questions."""

    name: str
    n: int
    before: float
    after: float
    low: float
    """Lower end of the 95 % interval of the difference after - before."""
    high: float
    """Its upper end."""
    p_value: float
    test: str
    interval: str = ""
    """How the interval was made."""
    unit: str = "%"
    """What before, after and the interval are in: "%" (shares from 0 to 1), "nats" (per token) or "tokens"."""
    better: str = "higher"
    """ "higher", "lower" or "neither"."""
    detectable: float | None = None
    """Smallest true difference that this n would have shown in 80 % of runs; None where no difference would."""
    before_interval: tuple[float, float] | None = None
    """95 % interval of `before` by itself (Wilson), for shares."""
    after_interval: tuple[float, float] | None = None
    fixed: int | None = None
    """Questions wrong before and right after, for shares."""
    broken: int | None = None
    """Questions right before and wrong after, for shares."""
    group: str = "all"
    """ "all", "family" (one family of cases) or "chat" (before through the base model's own chat template)."""

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no detectable difference"; "higher" or "lower" for what is neither good nor bad.

        A difference is seen where the paired test gives p < 0.05 and the 95 % interval lies on one side of 0. Either alone
        would raise false alarms in up to 7 % of runs where differences are skewed and rows few; both do in under 5 %.
        """
        if self.p_value >= 1 - LEVEL or self.low <= 0 <= self.high:
            return UNCHANGED
        up = self.difference > 0
        if self.better == "neither":
            return "higher" if up else "lower"
        return "better" if up == (self.better == "higher") else "worse"

    @property
    def sentence(self) -> str:
        """The verdict in one plain sentence: how much, how sure, by which test, and if nothing was seen what could have been."""
        verdict = self.verdict.replace("higher", f"more {self.unit}").replace("lower", f"fewer {self.unit}")
        levels = [self._level(side) for side in ("before", "after")]
        size = f"{self._show(self.difference, '+')} {'points' if self.unit == '%' else self.unit}"
        interval = f"({self._show(self.low, '+')} to {self._show(self.high, '+')})"
        changed = f", {self.fixed} fixed, {self.broken} broken" if self.fixed is not None else ""
        text = f"{self.name}: {verdict}, {levels[0]} before, {levels[1]} after, {size} {interval}; {self.test} p {_p(self.p_value)}"
        return f"{text}{changed}{self._could() if self.verdict == UNCHANGED else ''}."

    def _level(self, side) -> str:
        interval, value = getattr(self, f"{side}_interval"), self._show(getattr(self, side))
        if interval is None:
            return value
        return f"{value} % ({self._show(interval[0])} to {self._show(interval[1])})"

    def _could(self) -> str:
        if self.detectable is None:
            return f"; n = {self.n} could not have shown any difference"
        if not self.detectable:
            return "; every row differs alike" if self.difference else "; no row differs"
        unit = "points" if self.unit == "%" else self.unit
        return f"; n = {self.n} would have shown {self._show(self.detectable)} {unit} or more in 4 of 5 runs"

    def _show(self, value, sign="") -> str:
        scale, digits = (100, 1) if self.unit == "%" else (1, 3) if self.unit == "nats" else (1, 1)
        return f"{scale * value:{sign}.{digits}f}"


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 0.001 else "< 0.001"


def paired_proportions(name: str, before, after, **fields) -> Measure:
    """Two equally long sequences of True/False, one per question, compared by the exact McNemar test.

    The interval of the difference is Bonett and Price's (2012, J Educ Behav Stat 37:479-488): the normal interval of
    the mean paired difference after one pair of each discordant kind has been added, which keeps its rate for small n
    and never has the width 0 (statsmodels `DescrStatsW`). Before and after by themselves have Wilson intervals.
    """
    import numpy
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_confint
    from statsmodels.stats.weightstats import DescrStatsW

    before, after = numpy.asarray(before, dtype=bool), numpy.asarray(after, dtype=bool)
    n, fixed, broken = len(before), int((~before & after).sum()), int((before & ~after).sum())
    table = [[int((before & after).sum()), broken], [fixed, int((~before & ~after).sum())]]
    difference = numpy.concatenate([after.astype(float) - before, [1.0, -1.0]])
    low, high = DescrStatsW(difference).zconfint_mean(1 - LEVEL)
    return Measure(
        name, n, float(before.mean()), float(after.mean()), max(float(low), -1.0), min(float(high), 1.0),
        p_value=float(mcnemar(table, exact=True).pvalue) if fixed + broken else 1.0,
        test="exact McNemar", interval="Bonett-Price",
        before_interval=tuple(map(float, proportion_confint(before.sum(), n, 1 - LEVEL, "wilson"))),
        after_interval=tuple(map(float, proportion_confint(after.sum(), n, 1 - LEVEL, "wilson"))),
        fixed=fixed, broken=broken, detectable=smallest_difference(n, (fixed + broken) / n), **fields,
    )  # fmt: skip


def mcnemar_power(n: int, discordant: float, difference: float, alpha: float = 1 - LEVEL) -> float:
    """Chance that the exact McNemar test over n pairs gives p < `alpha`, by summation over the number of discordant pairs.

    `discordant` is the share of pairs that change, in either direction, and `difference` the share fixed minus the
    share broken (the unconditional power of Miettinen 1968, Biometrics 24:339-352).
    """
    import numpy
    from scipy.stats import binom

    changed = numpy.arange(n + 1)
    most = binom.ppf(alpha / 2, changed, 0.5)  # the most of one kind at which the two-sided test still rejects
    most = numpy.where(binom.cdf(most, changed, 0.5) > alpha / 2, most - 1, most)
    share_fixed = (discordant + difference) / (2 * discordant)
    reject = binom.cdf(most, changed, share_fixed) + binom.sf(changed - most - 1, changed, share_fixed)
    return float((binom.pmf(changed, n, discordant) * reject).sum())


def smallest_difference(n: int, discordant: float, alpha: float = 1 - LEVEL) -> float | None:
    """Smallest share fixed minus share broken that exact McNemar over n pairs shows in 80 % of runs; None if none.

    With `discordant` pairs changing as were seen here, or as many as the difference itself needs.
    """
    from scipy.optimize import brentq

    def lacking(difference):
        return mcnemar_power(n, max(discordant, difference), difference, alpha) - POWER

    return float(brentq(lacking, 1e-9, 1.0, xtol=1e-4)) if lacking(1.0) > 0 else None


def paired_means(name: str, before, after, weights=None, seed: int = 3407, **fields) -> Measure:
    """Two equally long sequences of numbers, one per row, compared by their means (weighted, as in nats per token).

    The interval is a paired bootstrap over rows (BCa, 9,999 resamples, `scipy.stats.bootstrap`), the p-value a paired
    permutation test that swaps before and after within rows (`scipy.stats.permutation_test`); the smallest difference
    is that of a paired t-test (statsmodels `TTestPower`).
    """
    import numpy
    from scipy.stats import bootstrap, permutation_test
    from statsmodels.stats.power import TTestPower

    before, after = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    weights = numpy.ones(len(before)) if weights is None else numpy.asarray(weights, dtype=float)
    n, total = len(before), weights.sum()

    def difference_of_means(old, new, weight, axis=-1):
        return ((new - old) * weight).sum(axis) / weight.sum(axis)

    difference = float(difference_of_means(before, after, weights))
    rows = (after - before) * weights * n / total  # their plain mean is the weighted difference
    low = high = difference
    p_value, detectable = 1.0, None
    if n > 1 and numpy.ptp(after - before) > 0:
        found = bootstrap(
            (before, after, weights), difference_of_means, paired=True, vectorized=True, n_resamples=RESAMPLES,
            confidence_level=LEVEL, method="BCa", rng=numpy.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            low, high = float(found.low), float(found.high)
    if n > 1 and (after != before).any():
        p_value = permutation_test(
            (before * weights, after * weights), lambda old, new, axis: (new - old).sum(axis), permutation_type="samples",
            vectorized=True, n_resamples=RESAMPLES, rng=numpy.random.default_rng(seed),
        ).pvalue  # fmt: skip
    if n > 5:  # of fewer rows the permutation test never gives p < 0.05: 2 / 2^5 = 0.06
        detectable = float(TTestPower().solve_power(nobs=n, alpha=1 - LEVEL, power=POWER)) * float(rows.std(ddof=1))
    means = [float((values * weights).sum() / total) for values in (before, after)]
    return Measure(
        name, n, *means, low, high, float(p_value), "paired permutation", "paired bootstrap, BCa", detectable=detectable, **fields
    )  # fmt: skip


# --- the comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Before and after on the same questions: the measures, and every row to read."""

    measures: tuple[Measure, ...]
    rows: tuple[dict, ...]
    """One a generated answer: question, reference, family, before and after (parsed), outcome before and after, change."""
    choice_rows: tuple[dict, ...] = ()
    """One a question answered by likelihood: question, choices, answer_index, and the option chosen before and after."""
    showcase: tuple[dict, ...] = ()
    """The showcase question in the form of `rows`, with `training_row`; empty where it was not asked."""
    leaks: Leaks | None = None
    left_out: int = 0
    """Evaluation questions left out because they stand in the training rows."""
    sources: dict = field(default_factory=dict)
    """Which cache file each number came from."""

    @property
    def forgotten(self) -> tuple[dict, ...]:
        """What was right before and is wrong now: question, expected, before and after, and how it was asked."""
        generated = [
            {
                "asked": "generated", "question": row["question"], "expected": row["expected"],
                "before": row["before"].response.strip(), "after": row["after"].response.strip(),
            }
            for row in self.rows if row["outcome_before"].correct and not row["outcome_after"].correct
        ]  # fmt: skip
        likelihood = [
            {
                "asked": "likelihood", "question": row["question"], "expected": row["choices"][row["answer_index"]],
                "before": row["choices"][row["before"]], "after": row["choices"][row["after"]],
            }
            for row in self.choice_rows if row["before"] == row["answer_index"] != row["after"]
        ]  # fmt: skip
        return tuple(generated + likelihood)

    @property
    def examples(self) -> tuple[dict, ...]:
        """Three answers to read in full, by a fixed rule: the first that was fixed, broken and unchanged."""
        first = (next((row for row in self.rows if row["change"] == kind), None) for kind in CHANGES)
        return tuple(row for row in first if row is not None)

    def __str__(self):
        lines = [f"{'measure':<30}{'n':>4}{'before':>7}{'after':>7}{'difference [95 %]':>26}  verdict"]
        for m in self.measures:
            interval = f"{m._show(m.difference, '+')} [{m._show(m.low, '+')}, {m._show(m.high, '+')}]"
            lines.append(
                f"{m.name[:29]:<30}{m.n:>4}{m._show(m.before):>7}{m._show(m.after):>7}{interval:>26}  {m.verdict}"
            )
        lines += ["", *self.verdicts.splitlines()]
        return "\n".join(lines)

    @property
    def verdicts(self) -> str:
        """One plain sentence a measure, and how many false alarms to expect."""
        lines = [
            line
            for m in self.measures
            for line in textwrap.wrap(f"- {m.sentence}", 98, subsequent_indent="  ", break_on_hyphens=False)
        ]
        note = (
            "In brackets 95 % intervals: of shares Wilson's, of their differences Bonett and Price's, of differences of means "
            "a paired bootstrap over rows (BCa), each by itself; p-values of families are Holm's, over all of them. nats: "
            "negative log-likelihood per token, lower is better. Each verdict is "
            "wrong in at most 5 % of runs where nothing changed."
        )
        if self.left_out:
            note += f" {self.left_out} questions are left out because they stand in the training rows."
        return "\n".join([*lines, *textwrap.wrap(note, 98)])


CHANGES = ("fixed", "broken", "unchanged")


def compare(before, after, rows, questions: Questions | None = None, leaks: Leaks | None = None) -> Comparison:
    """Pairs what two models did on the same rows and measures the difference.

    `before` and `after` are `Results` (`evaluate`) or `Answers` (`generate_answers`), `rows` the evaluation rows,
    `questions` the multiple-choice questions that were asked; what `leaks` names is left out. Raises MedcotError if an
    answer is to another question than its row, a row has no reference, or the two are not of the same questions.
    """
    before, after = (_as_parts(side) for side in (before, after))
    leaked = set() if leaks is None else leaks.questions
    paired = _pair(before["answers"], after["answers"], rows)
    by_choice = () if questions is None else questions.rows
    asked = [
        {"question": row["question"], "Response": row["choices"][row["answer_index"]], **_graded(row)}
        for row in by_choice
    ]
    if before["choice_answers"] is not None and after["choice_answers"] is not None:
        paired += _pair(before["choice_answers"], after["choice_answers"], asked)
    kept = [row for row in paired if normalise(row["plain_question"]) not in leaked]
    measures, choice_rows = [], []
    references, options = _both(before, after, "references"), _both(before, after, "choices")
    kept_rows = {i for i in range(len(rows)) if normalise(rows[i]["Question"]) not in leaked}
    kept_choices = {i for i, row in enumerate(by_choice) if normalise(row["question"]) not in leaked}
    if references and kept_rows:
        measures.append(_likelihood("reference, nats per token", *references, kept_rows))
    if options and kept_choices:
        choice_rows = _chosen(*options, by_choice, kept_choices)
        measures.append(_share_right("multiple choice", choice_rows))
        per_byte = _chosen(*options, by_choice, kept_choices, per_byte=True)
        measures.append(_share_right("multiple choice, per byte", per_byte))
    if not kept and not measures:
        raise MedcotError("every evaluation question stands in the training rows: choose other evaluation rows")
    measures += _generated(kept)
    measures += _through_chat(before, after, rows, asked, by_choice, leaked, kept_rows, kept_choices)
    showcase = ()
    if before["showcase"] is not None and after["showcase"] is not None:
        old, new = before["showcase"][0], after["showcase"][0]
        showcase = (
            {
                "question": old.question, "reference": old.reference, "training_row": before["showcase_trained"],
                "before": old.parsed, "after": new.parsed,
            },
        )  # fmt: skip
    return Comparison(
        tuple(measures), tuple(kept), tuple(choice_rows), showcase, leaks,
        left_out=len(leaked),
        sources={
            name: [str(before[name].path), str(after[name].path)]
            for name in before if hasattr(before[name], "path") and hasattr(after[name], "path")
        },
    )  # fmt: skip


def _through_chat(before, after, rows, asked, by_choice, leaked, kept_rows, kept_choices) -> list[Measure]:
    """Before through the base model's own chat template against after as trained, where it was measured."""
    measures, names = [], ("right answer", "well formed", "length")
    if before["chat_references"] is not None and after["references"] is not None and kept_rows:
        sides = before["chat_references"], after["references"]
        measures.append(_likelihood("reference, own template", *sides, kept_rows, group="chat"))
    if before["chat_choices"] is not None and after["choices"] is not None:
        both = kept_choices & before["chat_choices"].items.keys()
        chosen = _chosen(before["chat_choices"], after["choices"], by_choice, both)
        measures += [_share_right("multiple choice, own template", chosen, group="chat")] if chosen else []
    if before["chat_answers"] is not None:
        trained = after["choice_answers"]
        paired = _pair(before["chat_answers"], trained or after["answers"], asked if trained else rows)
        kept = [row for row in paired if normalise(row["plain_question"]) not in leaked]
        found = [m for m in _generated(kept, families=False) if m.name in names]
        measures += [replace(m, name=f"{m.name}, own template", group="chat") for m in found]
    return measures


def _share_right(name, chosen, **fields) -> Measure:
    """Share of questions whose right option was chosen by likelihood (`_chosen`)."""
    sides = [[row[side] == row["answer_index"] for row in chosen] for side in ("before", "after")]
    return paired_proportions(name, *sides, **fields)


_PARTS = (
    "answers", "choice_answers", "showcase", "showcase_trained", "references", "choices", "chat_answers", "chat_references",
    "chat_choices",
)  # fmt: skip


def _as_parts(side) -> dict:
    """The parts of a `Results` by name; of an `Answers` alone, that one."""
    if hasattr(side, "answers"):
        return {name: getattr(side, name) for name in _PARTS}
    return dict.fromkeys(_PARTS) | {"answers": side}


def _both(before, after, name):
    old, new = before[name], after[name]
    if (old is None) != (new is None):
        raise MedcotError(f"{name} were measured on one side only: measure both with evaluate")
    if old is not None and old.items.keys() != new.items.keys():
        odd = min(old.items.keys() ^ new.items.keys())
        raise MedcotError(f"row {odd} was scored in only one of {old.path} and {new.path}: score the same rows")
    return (old, new) if old is not None else None


def _graded(row) -> dict:
    return {"choices": row["choices"], "answer_index": row["answer_index"]}


def _pair(before, after, rows) -> list[dict]:
    """Every question of two `Answers` with both answers, both outcomes and what changed."""
    if len(before) != len(after) or len(before) > len(rows):
        raise MedcotError(
            f"{before.path} has {len(before)} answers and {after.path} {len(after)}, for {len(rows)} rows: "
            "answer the same rows"
        )
    paired = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        row = _with_choices(rows[i], i)
        plain = row["Question"] if "Question" in row else row["question"]
        for side, answers in ((old, before), (new, after)):
            # A question asked with its options listed starts with the question.
            if side.question != plain and not (row.get("choices") and side.question.startswith(f"{plain}\n")):
                raise MedcotError(
                    f"answer {i} in {answers.path} is to another question than row {i} "
                    f"({side.question[:60]!r}, not {plain[:60]!r}): answer the same rows"
                )
        if not (row.get("Response") or "").strip():
            raise MedcotError(
                f"row {i} ({plain[:60]!r}) has no reference (Response): answers cannot be compared with it"
            )
        outcomes = grade(row, old), grade(row, new)
        expected = row["choices"][row["answer_index"]] if row.get("choices") else row.get("answer") or row["Response"]
        paired.append(
            {
                "question": old.question, "plain_question": plain, "reasoning_reference": row.get("Complex_CoT", ""),
                "reference": row["Response"], "expected": expected, "family": row.get("family"), "before": old.parsed,
                "after": new.parsed, "outcome_before": outcomes[0], "outcome_after": outcomes[1], "change": _change(*outcomes),
            }
        )  # fmt: skip
    return paired


def _with_choices(row, i: int) -> dict:
    """An evaluation row, with `choices` and `answer_index` where it carries options in any known form; checked."""
    if not row.get("choices") and not (row.get("options") and row.get("answer_idx") is not None):
        return row
    found = _question({"question": "-", **{name: row[name] for name in row if name in _OPTIONS}}, f"evaluation row {i}")
    return row | _graded(found)


_OPTIONS = ("choices", "options", "answer_index", "answer_idx", "answer")


def _change(before: Outcome, after: Outcome) -> str:
    """ "fixed", "broken" or "unchanged": by the answer, or by the form where there is no answer to grade."""
    old, new = (o.well_formed if o.correct is None else o.correct for o in (before, after))
    return "unchanged" if old == new else "fixed" if new else "broken"


def _likelihood(name, before, after, kept, group="all") -> Measure:
    """Nats per token of the references: the rows' sums over the tokens of all rows, so long rows weigh more."""
    rows = sorted(kept & before.items.keys() & after.items.keys())
    tokens = [before.items[i][1][0] for i in rows]
    old, new = (
        [-side.items[i][0][0] / count for i, count in zip(rows, tokens, strict=True)] for side in (before, after)
    )
    return paired_means(name, old, new, tokens, unit="nats", better="lower", group=group)


def _chosen(before, after, questions, kept, per_byte: bool = False) -> list[dict]:
    """The option of the highest log-likelihood before and after; `per_byte` divides it by the option's UTF-8 bytes."""
    rows = []
    for i in sorted(kept):
        row = questions[i] if i < len(questions) else None
        if row is None or i not in before.items or len(before.items[i][0]) != len(row["choices"]):
            raise MedcotError(f"{before.path} and {after.path} do not hold the options of question {i}: score it again")
        lengths = [len(choice.encode()) if per_byte else 1 for choice in row["choices"]]
        best = [
            max(range(len(lengths)), key=lambda k, s=side.items[i][0]: s[k] / lengths[k]) for side in (before, after)
        ]
        rows.append({"row": i, "question": row["question"], **_graded(row), "before": best[0], "after": best[1]})
    return rows


def _generated(rows, families: bool = True) -> list[Measure]:
    """Everything measured on generated answers: right, by which steps, in which form, and right by family."""

    def both(name, chosen):
        return [[getattr(row[f"outcome_{side}"], name) for row in chosen] for side in ("before", "after")]

    def share(name, attribute, **fields):
        known = [row for row in rows if getattr(row["outcome_before"], attribute) is not None]
        return [paired_proportions(name, *both(attribute, known), **fields)] if known else []

    measures = share("right answer", "correct") + share("option extracted", "extracted")
    measures += share("every step right", "steps_correct") + share("well formed", "well_formed")
    measures += share("think closed", "closed") + share("stopped by itself", "stopped")
    measures += share("answer present", "answered")
    if rows:
        measures.append(paired_means("length", *both("length", rows), unit="tokens", better="neither"))
        measures.append(paired_means("repeated 4-word sequences", *both("repetition", rows), better="lower"))
    graded = [row for row in rows if row["family"] and row["outcome_before"].correct is not None]
    names = list(Counter(row["family"] for row in graded)) if families else []
    if names:
        from statsmodels.stats.multitest import multipletests

        each = [
            paired_proportions(
                f"right answer, {name}",
                *both("correct", [row for row in graded if row["family"] == name]),
                group="family",
            )
            for name in names
        ]
        # Eight families would raise a false alarm in a third of all runs: Holm's step-down keeps all of them at 5 %. Its
        # first step tests at 5 % / number of families, which is what the smallest difference has to reach.
        adjusted = multipletests([m.p_value for m in each], alpha=1 - LEVEL, method="holm")[1]
        test, alpha = f"exact McNemar, Holm over {len(each)},", (1 - LEVEL) / len(each)
        measures += [
            replace(
                m, p_value=float(p), test=test, detectable=smallest_difference(m.n, (m.fixed + m.broken) / m.n, alpha)
            )
            for m, p in zip(each, adjusted, strict=True)
        ]
    return measures
