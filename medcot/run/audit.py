"""What is in the training rows, looked at before any GPU time is spent on them."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from ..data import SHOWCASE_QUESTION, Splits, encode_rows, normalise
from ..prompts import THINK_CLOSE, THINK_OPEN
from ..rows import COLUMNS
from ..settings import EMBEDDED_CASES

INK, LIMIT = "#1f5a96", "#c4561b"


@dataclass(frozen=True)
class Audit:
    """What a look at the training rows found before any GPU time is spent."""

    source: str
    rows: int
    duplicates: int
    """Training rows whose question already stood in an earlier one."""
    think_tags: int
    """Rows with a think tag inside a field; the prompt defuses them."""
    outer_white_space: int
    """Rows with a field that starts or ends in white space; kept as they are."""
    non_ascii: int
    token_counts: tuple[int, ...]
    """Length of each whole training example in tokens, in row order."""
    max_seq_length: int
    """The limit in tokens."""
    dropped: dict
    """Rows left out while loading, counted by reason."""
    showcase_in_training: bool
    """Whether the original's showcase question is a training row."""
    answered: int
    """Questions that a model answers in words, once before and once after."""

    @property
    def over_long(self) -> tuple[int, ...]:
        """Indices of the rows that would lose their answer at `max_seq_length`."""
        return tuple(i for i, count in enumerate(self.token_counts) if count > self.max_seq_length)

    def _showcase(self):
        if self.source == EMBEDDED_CASES:
            return "the showcase question is not asked here: a training row stands in for it"
        found = "a training row: no evidence of learning" if self.showcase_in_training else "not a training row"
        return f"the showcase question is {found}"

    def __str__(self):
        counts = sorted(self.token_counts)
        p95 = counts[min(len(counts) - 1, int(0.95 * len(counts)))]
        lines = [f"{self.rows} training rows from {self.source}"]
        lines += [f"  {count} rows {reason}" for reason, count in self.dropped.items()]
        lines += [
            f"  {self.duplicates} repeat the question of an earlier row",
            f"  {self.think_tags} have a think tag inside a field (defused by the prompt)",
            f"  {self.outer_white_space} have outer white space, {self.non_ascii} have non-ASCII characters (both kept)",
            f"  tokens per example: mean {statistics.fmean(counts):.0f}, 95th percentile {p95}, longest {counts[-1]}",
            f"  {len(self.over_long)} would lose their answer at max_seq_length {self.max_seq_length}"
            + (
                f" (rows {', '.join(map(str, self.over_long[:8]))}): left out, or raise max_seq_length"
                if self.over_long
                else ""
            ),
            f"  {self._showcase()}",
            f"  {self._power()}",
        ]
        return "\n".join(lines)

    def _power(self):
        # Normal approximation of McNemar's power where a fifth of the answers change (the exact one is in `evaluation`):
        # (1.96 + 0.84) standard errors, of sqrt(0.2 / n) each.
        points = 280 * math.sqrt(0.2 / self.answered)
        few = ": FEW, only an implausible change would be seen" if points > 20 else ""
        return f"{self.answered} answers in words would show a change of about {points:.0f} points or more{few}"

    def plot(self):
        """Histogram of the examples' lengths in tokens; the limit is marked, or named where it lies far beyond."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.hist(self.token_counts, bins=40, color=INK)
        axes.set(xlabel="tokens per training example", ylabel="examples")
        axes.spines[["top", "right"]].set_visible(False)
        if self.max_seq_length > 2 * max(self.token_counts):  # drawn, it would press the bars together
            axes.set_title(f"all far below max_seq_length {self.max_seq_length:,}", loc="right", fontsize="medium")
        else:
            axes.axvline(self.max_seq_length, color=LIMIT, label=f"max_seq_length {self.max_seq_length:,}")
            axes.legend(frameon=False)
        return figure


def audit(splits: Splits, tokenizer, settings) -> Audit:
    """Looks at every training row once; `tokenizer` counts the tokens of the whole example, prompt and EOS included."""
    questions = Counter(map(normalise, splits.train["Question"]))
    rows = list(zip(*(splits.train[column] for column in COLUMNS), strict=True))
    return Audit(
        source=splits.source,
        rows=len(rows),
        duplicates=len(rows) - len(questions),
        think_tags=sum(any(tag in text for text in row for tag in (THINK_OPEN, THINK_CLOSE)) for row in rows),
        outer_white_space=sum(any(text != text.strip() for text in row) for row in rows),
        non_ascii=sum(not all(text.isascii() for text in row) for row in rows),
        token_counts=tuple(map(len, encode_rows(splits.train, tokenizer, settings)["input_ids"])),
        max_seq_length=settings.max_seq_length,
        dropped=dict(splits.dropped),
        showcase_in_training=normalise(SHOWCASE_QUESTION) in questions,
        answered=settings.choice_answer_rows or min(settings.answer_rows, len(splits.eval)),
    )
