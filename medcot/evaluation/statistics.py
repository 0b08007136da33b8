"""Paired statistics in numbers: two equally long sequences become a Measure, many measures are judged together."""

import functools
import math
from dataclasses import dataclass, replace

LEVEL, POWER = 0.95, 0.8
FEW = 10  # pairs below which counts are shown and nothing is concluded
IMPLAUSIBLE = 0.2  # a change of this share that a number of pairs cannot show is larger than any to be expected
UNCHANGED, TOO_FEW = "no detectable difference", "too few to tell"
PRIMARY, SECONDARY, FAMILY, DETAIL, PROMPT = "primary", "secondary", "family", "detail", "prompt"


@dataclass(frozen=True)
class Measure:
    """One measure before and after, paired over the same questions."""

    name: str
    n: int
    """Pairs."""
    before: float
    after: float
    difference: float
    """after - before; of means weighted by tokens, the difference of these."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    p_value: float
    """Of this measure by itself."""
    test: str
    interval: str
    """How the interval was made."""
    unit: str = "%"
    """What before, after and the interval are in: "%" (shares from 0 to 1), "nats" (per token) or "tokens"."""
    better: str = "higher"
    """ "higher", "lower" or "neither"."""
    group: str = SECONDARY
    """ "primary" (declared beforehand), "secondary", "family" (secondary, one family of cases), "detail" (a part of another
    measure, no verdict) or "prompt" (base through its own chat template against base through this project's prompt: it
    says what the prompt alone does and nothing about tuning, so no verdict)."""
    before_interval: tuple[float, float] | None = None
    """95 % interval of `before` by itself (Wilson), for shares."""
    after_interval: tuple[float, float] | None = None
    fixed: int | None = None
    """Questions wrong before and right after, for shares."""
    broken: int | None = None
    """Questions right before and wrong after, for shares."""
    spread: float | None = None
    """Standard deviation of the rows' differences, for means."""
    adjusted_p: float | None = None
    """After Holm's correction over all secondary measures and families; of the primary its own; None without a verdict."""
    detectable: float | None = None
    """Smallest true difference that would have got a verdict in 80 % of runs; None where none would."""
    verdict: str | None = None
    """ "better", "worse" or "no detectable difference"; "higher" or "lower" for what is neither good nor bad; "too few to
    tell" below ten pairs; None for what is only described (`judge`)."""


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
    low, high = DescrStatsW(numpy.concatenate([after.astype(float) - before, [1.0, -1.0]])).zconfint_mean(1 - LEVEL)
    return Measure(
        name, n, float(before.mean()), float(after.mean()), (fixed - broken) / n, max(float(low), -1.0), min(float(high), 1.0),
        p_value=float(mcnemar(table, exact=True).pvalue) if fixed + broken else 1.0,
        test="exact McNemar", interval="Bonett-Price", fixed=fixed, broken=broken,
        before_interval=tuple(map(float, proportion_confint(before.sum(), n, 1 - LEVEL, "wilson"))),
        after_interval=tuple(map(float, proportion_confint(after.sum(), n, 1 - LEVEL, "wilson"))), **fields,
    )  # fmt: skip


def paired_means(name: str, before, after, weights=None, **fields) -> Measure:
    """Two equally long sequences of numbers, one per row, compared by their means (weighted, as in nats per token).

    Test and interval are Student's t over the rows' differences; of weighted means, a ratio of two sums over rows, over
    its linearisation w (d - mean) / mean w (Cochran 1977, Sampling Techniques, 6.4). With 5 % of lengths at the limit a
    t interval keeps its rate where BCa bootstrap intervals do not (tests/test_statistics.py).
    """
    import numpy
    from scipy.stats import t

    before, after = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    weights = numpy.ones(len(before)) if weights is None else numpy.asarray(weights, dtype=float)
    n, weights = len(before), weights / weights.mean()
    means = [float((values * weights).mean()) for values in (before, after)]
    difference = float(((after - before) * weights).mean())
    low, high, p_value, spread = -math.inf, math.inf, 1.0, 0.0
    if n > 1:
        spread = float((weights * (after - before - difference)).std(ddof=1))
        error = spread / math.sqrt(n)
        half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
        low, high = difference - half, difference + half
        p_value = 2 * float(t.sf(abs(difference) / error, n - 1)) if error else float(not difference)
    return Measure(name, n, *means, difference, low, high, p_value, "paired t", "t", spread=spread, **fields)


# --- what n can show ---------------------------------------------------------------------------------------------------


def mcnemar_power(n: int, discordant: float, difference: float, alpha: float = 1 - LEVEL) -> float:
    """Chance that the exact McNemar test over n pairs gives p < `alpha`, by summation over the number of discordant pairs.

    `discordant` is the share of pairs that change, in either direction, and `difference` the share fixed minus the
    share broken (the unconditional power of Miettinen 1968, Biometrics 24:339-352).
    """
    import numpy
    from scipy.stats import binom

    changed, most = _rejected_up_to(n, alpha)
    share_fixed = (discordant + difference) / (2 * discordant)
    reject = binom.cdf(most, changed, share_fixed) + binom.sf(changed - most - 1, changed, share_fixed)
    return float((binom.pmf(numpy.arange(n + 1), n, discordant) * reject).sum())


@functools.lru_cache(maxsize=64)
def _rejected_up_to(n: int, alpha: float):
    """The numbers of discordant pairs, and of each the most of one kind at which the two-sided test still rejects."""
    import numpy
    from scipy.stats import binom

    changed = numpy.arange(n + 1)
    most = binom.ppf(alpha / 2, changed, 0.5)
    return changed, numpy.where(binom.cdf(most, changed, 0.5) > alpha / 2, most - 1, most)


@functools.lru_cache(maxsize=1024)
def smallest_difference(n: int, discordant: float, alpha: float = 1 - LEVEL) -> float | None:
    """Smallest share fixed minus share broken that exact McNemar over n pairs shows in 80 % of runs; None if none.

    With `discordant` pairs changing as were seen here, or as many as the difference itself needs.
    """
    from scipy.optimize import brentq

    def lacking(difference):
        return mcnemar_power(n, max(discordant, difference), difference, alpha) - POWER

    return float(brentq(lacking, 1e-9, 1.0, xtol=1e-3)) if lacking(1.0) > 0 else None


def _detectable(measure: Measure, alpha: float) -> float | None:
    if measure.spread is None:
        return smallest_difference(measure.n, (measure.fixed + measure.broken) / measure.n, alpha)
    return _smallest_effect(measure.n, alpha) * measure.spread


@functools.lru_cache(maxsize=256)
def _smallest_effect(n: int, alpha: float) -> float:
    """Smallest mean difference, in standard deviations, that a paired t-test over n rows shows in 80 % of runs."""
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().solve_power(nobs=n, alpha=alpha, power=POWER))


# --- verdicts ----------------------------------------------------------------------------------------------------------


def judge(measures, primary: str) -> tuple[Measure, ...]:
    """The measures with their verdicts, the primary one first: it alone is held to 5 %, all others together to 5 %.

    The others are every secondary measure and every family of ten pairs or more, corrected by Holm's step-down (1979,
    Scand J Statist 6:65-70), whose first step tests at 5 % / their number: that is what `detectable` has to reach.
    """
    measures = [replace(m, group=PRIMARY) if m.name == primary and m.group == SECONDARY else m for m in measures]
    alpha, together = 1 - LEVEL, [m for m in measures if m.group in (SECONDARY, FAMILY) and m.n >= FEW]
    adjusted = {m.name: p for m, p in zip(together, _holm([m.p_value for m in together]), strict=True)}

    def judged(m):
        if m.group in (DETAIL, PROMPT):
            return m
        if m.n < FEW:
            return replace(m, verdict=TOO_FEW)
        p, level = (m.p_value, alpha) if m.group == PRIMARY else (adjusted[m.name], alpha / len(together))
        return replace(m, adjusted_p=p, verdict=_verdict(m, p), detectable=_detectable(m, level))

    return tuple(sorted(map(judged, measures), key=lambda m: m.group != PRIMARY))


def _holm(p_values: list[float]) -> list[float]:
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def _verdict(m: Measure, p: float) -> str:
    """A difference is seen where the test gives p < 0.05 and the 95 % interval lies on one side of 0.

    Either alone would raise false alarms in up to 7 % of runs where differences are skewed and rows few; both do in under
    5 %.
    """
    if p >= 1 - LEVEL or m.low <= 0 <= m.high:
        return UNCHANGED
    up = m.difference > 0
    if m.better == "neither":
        return "higher" if up else "lower"
    return "better" if up == (m.better == "higher") else "worse"
