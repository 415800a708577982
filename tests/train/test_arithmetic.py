import re
from decimal import Decimal

import pytest
from vcore_train.arithmetic import answer_of, generate_problems

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if a % b == 0 else None,
}


@pytest.mark.parametrize("stories", [0.0, 0.5, 1.0])
def test_every_solution_is_right_and_follows_from_the_prompt(stories):
    for problem in generate_problems(400, seed=3, steps=(1, 5), largest=60, stories=stories):
        equations = EQUATION.findall(problem.response)
        assert len(equations) == problem.steps
        total = int(equations[0][0])
        given = [int(number) for number in re.findall(r"\d+", problem.prompt)]
        assert given == [total, *(int(b) for _, _, b, _ in equations)]
        for a, operator, b, result in equations:
            assert int(a) == total
            total = APPLY[operator](int(a), int(b))
            assert total == int(result)
            assert 1 <= total <= 60
        assert total == problem.answer == answer_of(problem.response)


def test_expressions_evaluate_to_their_answers():
    for problem in generate_problems(200, seed=1, stories=0.0):
        written = re.sub(r"^(Compute|What is|Work out) ", "", problem.prompt)
        assert re.fullmatch(r"[\d ()*/+-]+", written)
        assert eval(written.replace("/", "//")) == problem.answer


def test_seed_decides_everything_and_difficulty_varies():
    first = generate_problems(300, seed=7)
    assert first == generate_problems(300, seed=7)
    assert first != generate_problems(300, seed=8)
    assert {problem.steps for problem in first} == {1, 2, 3, 4}
    assert len({problem.prompt for problem in first}) == 300
    assert generate_problems(0) == []


def test_train_and_held_out_share_no_calculation():
    def calculations(problems):
        return {tuple(EQUATION.findall(problem.response)) for problem in problems}

    train = calculations(generate_problems(2000, seed=0, steps=(1, 2), largest=20))
    for seed in (0, 1):
        held_out = generate_problems(300, seed=seed, held_out=True, steps=(1, 2), largest=20)
        assert not train & calculations(held_out)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 4\n#### 72", 72),
        ("#### 1,234", 1234),
        ("#### $5", 5),
        ("####-3", -3),
        ("#### 0.5", Decimal("0.5")),
        ("#### 1\n#### 2", 2),
        ("#### 5.", 5),
        ("the answer is 5", None),
        ("#### none", None),
        ("#### ,", None),
        ("", None),
    ],
)
def test_answer_of(text, answer):
    assert answer_of(text) == answer


def test_impossible_requests_are_named():
    with pytest.raises(ValueError, match="found only"):
        generate_problems(5000, steps=(1, 1), largest=9, stories=0.0)
    with pytest.raises(ValueError, match="largest=3"):
        generate_problems(1, largest=3)
    with pytest.raises(ValueError, match=r"steps=\(0, 2\)"):
        generate_problems(1, steps=(0, 2))
