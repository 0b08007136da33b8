"""Invented answers and scores of two models, for the tests of what is concluded from them."""

from pathlib import Path

from medcot.evaluation.likelihood import Scored, Scores
from medcot.evaluation.measure import Results
from medcot.evaluation.questions import Questions
from medcot.run.answers import Answer, Answers

EOS = "<eos>"
ROW = {"Question": "Why?", "Complex_CoT": "one: 1\ntwo: 2", "Response": "This is a score of 2.", "answer": "score of 2",
       "family": "sums"}  # fmt: skip


def answer(completion, question="Why?", row=0):
    return Answer(row, question, ROW["Response"], completion, 5, EOS)


def answers(completions, questions=None):
    questions = questions or [f"Why {i}?" for i in range(len(completions))]
    return Answers(
        "x",
        Path("x.jsonl"),
        tuple(answer(*each, row) for row, each in enumerate(zip(completions, questions, strict=True))),
    )


ROWS = [ROW | {"Question": f"Why {i}?"} for i in range(8)]
RIGHT, WRONG = "one: 1\ntwo: 2\n</think>\nThis is a score of 2.<eos>", "one: 1\n</think>\nThis is a score of 1.<eos>"
QUESTIONS = Questions(
    tuple({"question": f"Which {i}?", "choices": ["no", "perhaps", "yes"], "answer_index": 2} for i in range(8)), "q", None, "ab"
)  # fmt: skip


def scores(best, name="x"):
    """Scores of three options a question: the `best` one of each is the likeliest."""
    rows = {i: Scored(tuple(-1.0 if k == b else -5.0 for k in range(3)), (1, 2, 1)) for i, b in enumerate(best)}
    return Scores(name, Path(f"{name}.jsonl"), rows)


def references(per_token):
    return Scores("x", Path("r.jsonl"), {i: Scored((-10.0 * nats,), (10,)) for i, nats in enumerate(per_token)})


def results(completions, per_token, best, **parts):
    return Results(answers(completions), references=references(per_token), choices=scores(best), **parts)


def named(comparison, name):
    return next(measure for measure in comparison.measures if measure.name == name)


class Split:
    source = "x"

    def __init__(self, train, evaluation):
        self.train, self.eval = {"Question": train}, {"Question": evaluation}


TEXTS = {  # what one answer does: right, reasoned as the reference does, of the trained form
    (True, True): "one: 1\ntwo: 2\n</think>\nThis is a score of 2.<eos>",
    (True, False): "one: 1\n</think>\nThis is a score of 2.<eos>",
    (False, True): "one: 1\ntwo: 2\n</think>\nThis is a score of 1.<eos>",
    (False, False): "one: 1\n</think>\nThis is a score of 1.<eos>",
}
RUNAWAY = "one: 1 and one: 1 and one: 1 and one: 1 and one"  # never closed, never ended


def families(n, count):
    """`n` evaluation rows, of `count` families in turn."""
    return [ROW | {"Question": f"Why {i}?", "family": f"family {i % count}"} for i in range(n)]


def draw(rng, hard, length, options):
    """Results of one model on questions as hard as they are (`hard`: chance of a right answer; `length`: its usual tokens;
    `options`: log-likelihoods): two draws are of models that do not differ, whose answers agree as far as questions do.
    """
    n = len(hard)
    right, steps = rng.random(n) < hard, rng.random(n) < hard
    away = rng.random(n) < 0.05
    tokens = [1024 if lost else int(t) for lost, t in zip(away, length * rng.lognormal(0, 0.2, n), strict=True)]
    items = tuple(
        Answer(
            i,
            f"Why {i}?",
            ROW["Response"],
            RUNAWAY if away[i] else TEXTS[bool(right[i]), bool(steps[i])],
            tokens[i],
            EOS,
        )
        for i in range(n)
    )
    likely = options + rng.normal(0, 1, options.shape)
    return Results(
        Answers("x", Path("x.jsonl"), items),
        references=references(length / 300 + rng.normal(0, 0.2, n)),
        choices=Scores(
            "x", Path("c.jsonl"), {i: Scored(tuple(map(float, row)), (1, 2, 1)) for i, row in enumerate(likely)}
        ),
    )


def nothing_changed(seed, n, count):
    """(before, after, rows, questions) of two models that do not differ, with `count` families."""
    import numpy

    rng = numpy.random.default_rng(seed)
    hard, length = rng.beta(2, 2, n), 300 * rng.lognormal(0, 0.3, n)
    options = rng.normal(0, 2, (n, 3))
    asked = tuple({"question": f"Which {i}?", "choices": ["no", "perhaps", "yes"], "answer_index": 2} for i in range(n))
    sides = [draw(rng, hard, length, options) for _ in range(2)]
    return *sides, families(n, count), Questions(asked, "q", None, "ab")
