"""Multi-step arithmetic problems with worked solutions: data that needs no download.

A problem is a chain of one to several operations on a running total, told as a short story or
written as an expression. Its solution spells out one equation a step and ends, as in GSM8K, with
``#### answer``. Everything follows from a seed. Which side of the train/held-out split a problem
falls on follows from a checksum of its arithmetic, so the two sides share no calculation, whatever
seeds and counts are used.
"""

import random
import re
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

_NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "nuts", "pens", "shells")
_STORY = {  # operator -> (how the problem tells it, how the solution begins its line)
    "+": (
        ("{name} finds {b} more.", "A friend gives {name} {b} more."),
        ("After that {name} has", "Together this makes"),
    ),
    "-": (
        ("{name} gives away {b}.", "Then {b} of them get lost."),
        ("After that {name} has", "What is left is"),
    ),
    "*": (
        ("Then the pile grows to {b} times its size.", "A wizard makes {b} of each of them."),
        ("The pile is now", "In all this makes"),
    ),
    "/": (
        (
            "{name} packs them into {b} equal boxes and keeps one box.",
            "{name} shares them fairly among {b} people, and counts one share.",
        ),
        ("One part has", "Each one gets"),
    ),
}
_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


@dataclass(frozen=True)
class Problem:
    """A problem, its worked solution, its answer and how many operations it takes."""

    prompt: str
    response: str
    answer: int
    steps: int


def answer_of(text: str) -> Decimal | None:
    """The number after the last ``####`` of a solution, or None where there is none.

    Reads GSM8K's conventions too (``#### 1,234``, ``#### $5``, ``#### -0.5``).
    """
    matches = _ANSWER.findall(text)
    if not matches:
        return None
    try:
        return Decimal(matches[-1].replace(",", ""))
    except InvalidOperation:  # only commas and a point
        return None


def generate_problems(
    count: int,
    *,
    seed: int = 0,
    held_out: bool = False,
    steps: tuple[int, int] = (1, 4),
    largest: int = 99,
    stories: float = 0.5,
) -> list[Problem]:
    """``count`` different problems, the same ones for the same arguments.

    ``steps``: least and most operations a problem, drawn uniformly. ``largest``: bound on every
    number, intermediate results included. ``stories``: share of problems told as a story; the
    others are plain expressions. One calculation in eight belongs to the held-out side.
    """
    low, high = steps
    if count < 0 or not 1 <= low <= high or largest < 9 or not 0 <= stories <= 1:
        raise ValueError(
            "generate_problems: expected count >= 0, 1 <= steps[0] <= steps[1], largest >= 9 and "
            f"0 <= stories <= 1, got count={count}, steps={steps}, largest={largest}, "
            f"stories={stories}."
        )
    rng = random.Random(f"{seed}-{held_out}")
    problems: dict[str, Problem] = {}
    for _ in range(100 * count + 1000):
        if len(problems) == count:
            return list(problems.values())
        start, chain = _draw_chain(rng, rng.randint(low, high), largest)
        if (zlib.crc32(repr((start, chain)).encode()) % 8 == 0) != held_out:
            continue
        tell = _story if rng.random() < stories else _expression
        problem = tell(rng, start, chain)
        problems.setdefault(problem.prompt, problem)
    raise ValueError(
        f"generate_problems: found only {len(problems)} different problems of {count} with "
        f"steps={steps} and largest={largest}. Ask for fewer, allow more steps or larger numbers."
    )


def _draw_chain(
    rng: random.Random, steps: int, largest: int
) -> tuple[int, list[tuple[str, int, int]]]:
    """A start and ``steps`` triples (operator, operand, result), every result in 1..largest."""
    start = total = rng.randint(2, largest // 2)
    chain = []
    for _ in range(steps):
        factors = [b for b in range(2, 10) if total * b <= largest]
        divisors = [b for b in range(2, 10) if total % b == 0]
        operators = "+" * (2 if total < largest else 0) + "-" * (2 if total > 1 else 0)
        operator = rng.choice(operators + "*" * bool(factors) + "/" * bool(divisors))
        if operator == "+":
            operand = rng.randint(1, largest - total)
            result = total + operand
        elif operator == "-":
            operand = rng.randint(1, total - 1)
            result = total - operand
        elif operator == "*":
            operand = rng.choice(factors)
            result = total * operand
        else:
            operand = rng.choice(divisors)
            result = total // operand
        chain.append((operator, operand, result))
        total = result
    return start, chain


def _equation(total: int, operator: str, operand: int, result: int) -> str:
    return f"{total} {operator} {operand} = {result}"


def _story(rng: random.Random, start: int, chain: list[tuple[str, int, int]]) -> Problem:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    told, worked = [f"{name} has {start} {thing}."], []
    total = start
    for operator, operand, result in chain:
        tellings, beginnings = _STORY[operator]
        told.append(rng.choice(tellings).format(name=name, b=operand))
        beginning = rng.choice(beginnings).format(name=name)
        worked.append(f"{beginning} {_equation(total, operator, operand, result)} {thing}.")
        total = result
    told.append(f"How many {thing} is that?")
    return _problem(" ".join(told), worked, total)


def _expression(rng: random.Random, start: int, chain: list[tuple[str, int, int]]) -> Problem:
    written, worked = str(start), []
    total = start
    for index, (operator, operand, result) in enumerate(chain):
        written = (
            f"{written} {operator} {operand}" if not index else f"({written}) {operator} {operand}"
        )
        worked.append(_equation(total, operator, operand, result))
        total = result
    return _problem(f"{rng.choice(('Compute', 'What is', 'Work out'))} {written}", worked, total)


def _problem(prompt: str, worked: list[str], answer: int) -> Problem:
    return Problem(prompt, "\n".join([*worked, f"#### {answer}"]), answer, len(worked))
