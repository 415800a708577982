import importlib.util
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from vcore_train.verifiers import (
    VERIFIERS,
    Verdict,
    Verification,
    exact_match,
    math_verify_match,
)

HANG_IN_PYTHON = "exec('while True: pass')"
HANG_IN_C = "9**9**9**9"
HANG_IN_SLEEP = "time.sleep(1000)"


def evaluating(**settings):
    """A verification whose verifier evaluates the response: a response can do anything.

    ``note(number)`` in a response writes the number into the file that is the reference answer.
    """

    def verifier(response, answer):
        def note(number):
            Path(answer).write_text(f"{number}\n")
            return 0

        names = {"note": note, "os": os, "subprocess": subprocess, "sys": sys, "time": time}
        return eval(response, names)

    return Verification(verifier, **settings)


def judge(verification, *responses, answer="", **settings):
    return verification.judge([(response, str(answer)) for response in responses], **settings)


def runs(pid):
    """Whether the process runs; one that has ended, though nobody has asked how, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def written(path):
    """The numbers that another process writes into the file, once they are there."""
    assert wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return [int(number) for number in path.read_text().split()]


# exact_match and math_verify_match


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("2 + 2 = 4\n#### 4", "4", 1.0),
        ("#### $1,234.00.", "1234", 1.0),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", "1/2", 0.0),
        ("#### 5", "4", 0.0),
        ("#### 44", "4", 0.0),
        ("4", "4", 0.0),
        ("####", "", 0.0),
        (r"\boxed{.}", "$", 0.0),
    ],
)
def test_exact_match(response, answer, reward):
    assert exact_match(response, answer) == reward


EQUAL = [
    ("1234", "1,234"),
    ("1{,}234", "1,234"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac12", "1/2"),
    ("1/2.", "0.5"),
    ("3/4", "0.75"),
    ("1 + x^2", "x^2+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("(1, 2)", "(1,2)"),
    ("2, 1", "1, 2"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("12", "12 apples"),
    ("12 apples", "12"),
    (r"\$12", "12"),
    ("50%", "0.5"),
    (r"\text{Monday}", "Monday"),
    ("B", r"\text{B}"),
    (r"$\frac{14}{2}$.", "$7$."),
    ("10^6", "1,000,000"),
    ("5 > x", "x < 5"),
    (r"10^{10^{10}}", r"10^{10^{10}}"),
]
DIFFERENT = [
    ("1235", "1,234"),
    (r"\frac{1}{3}", r"\frac{1}{2}"),
    ("x^2-1", "x^2+1"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("12 cats", "13 apples"),
    ("Tuesday", "Monday"),
    ("C", "B"),
    ("-5", "5"),
    ("3.14", r"\pi"),
    ("", "5"),
    ("5", ""),
    ("", ""),
]


@pytest.mark.parametrize("form", [r"It is \boxed{%s}.", "It is so.\n#### %s"])
@pytest.mark.parametrize(
    ("given", "answer", "reward"), [(*p, 1.0) for p in EQUAL] + [(*p, 0.0) for p in DIFFERENT]
)
def test_math_verify_match(form, given, answer, reward):
    assert math_verify_match(form % given, answer) == reward


def test_math_verify_searches_a_response_without_a_final_answer():
    assert math_verify_match("First 3, and so the answer is $x = 1234$ I think", "1,234") == 1.0
    assert math_verify_match("First 1,234, and so the answer is 3", "1234") == 0.0
    assert math_verify_match("no idea", "1234") == 0.0


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "$$$$",
        r"\boxed{\frac{1}{}",
        r"\boxed{\frac{1}{}}",
        r"\boxed{\left( 1}",
        r"$\frac{1}{$",
        r"\boxed{1 + }",
        r"\boxed{\undefined{5}}",
        "\\boxed{\0}",
        "#### \ud800",
        r"\boxed{\begin{pmatrix} 1 & }",
        r"\boxed{1/0}",
        "$" * 10_000,
        r"\frac{1}{" * 100,
    ],
)
def test_math_verify_gives_malformed_answers_nothing(malformed):
    assert math_verify_match(malformed, "5") == 0.0
    assert math_verify_match("#### 5", malformed) == 0.0


def test_math_verify_in_workers_survives_hostile_answers():
    good = ("so\n#### 1,000", "10^3")
    hostile = [
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
        r"\boxed{" * 100_000,
    ]
    pairs = [pair for response in hostile for pair in ((response, "7"), good)]
    with Verification("math-verify", seconds=1.5, workers=2) as verification:
        verdicts = verification.judge(pairs)
    assert verdicts[1::2] == [Verdict(1.0)] * len(hostile)
    assert verdicts[0] == Verdict(0.0, "timeout")
    for verdict in verdicts[::2]:
        assert verdict.reward == 0.0
        assert verdict.problem is None or verdict.problem == "timeout" or "died" in verdict.problem


# Verification


@pytest.mark.parametrize(
    ("error", "words", "verifier", "settings"),
    [
        (ValueError, "'exakt'.*exact, math-verify", "exakt", {}),
        (TypeError, "got int", 5, {}),
        (ValueError, "seconds must be positive", "exact", {"seconds": 0}),
        (ValueError, "seconds must be positive", "exact", {"seconds": math.nan}),
        (ValueError, "seconds must be positive", "exact", {"seconds": math.inf}),
        (ValueError, "workers must be at least 1", "exact", {"workers": 0}),
    ],
)
def test_bad_arguments(error, words, verifier, settings):
    with pytest.raises(error, match=words):
        Verification(verifier, **settings)


def test_a_function_that_cannot_be_pickled():
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot be sent to another process \(.*lock.*Open"):
        Verification(lambda response, answer: lock.locked())


@pytest.mark.parametrize("verifier", ["math-verify", math_verify_match])
def test_math_verify_is_not_installed(verifier, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        Verification(verifier)
    Verification("exact").close()


@pytest.mark.parametrize("verifier", ["exact", exact_match, VERIFIERS["exact"]])
def test_exact_needs_no_process(verifier, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    calls = []
    with Verification(verifier) as verification:
        verdicts = verification.judge(
            [("#### 4", "4"), ("#### 5", "4"), ("", "4")], lambda: calls.append(0)
        )
    assert verdicts == [Verdict(1.0), Verdict(0.0), Verdict(0.0)]
    assert len(calls) == 3


def test_nothing_to_judge(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with evaluating() as verification:
        assert verification.judge([]) == []


def test_many_answers_keep_their_order():
    rng = random.Random(0)
    delays = [rng.choice([0.0, 0.0, 0.02]) for _ in range(200)]
    calls = []

    def slow_sum(response, answer):
        time.sleep(float(response))
        return 1000 * float(response) + float(answer)

    with Verification(slow_sum, workers=3) as verification:
        pairs = [(str(delay), str(place)) for place, delay in enumerate(delays)]
        verdicts = verification.judge(pairs, lambda: calls.append(0))
    assert verdicts == [Verdict(1000 * delay + place) for place, delay in enumerate(delays)]
    assert len(calls) == 200


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (True, 1.0),
        (False, 0.0),
        (-2, -2.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(3), 3.0),
    ],
)
def test_rewards(value, reward):
    with Verification(lambda response, answer: value) as verification:
        (verdict,) = judge(verification, "")
    assert verdict == Verdict(reward)
    assert type(verdict.reward) is float


PROBLEMS = [
    ("1/0", "ZeroDivisionError: division by zero"),
    (r"int('5\n\n6')", r"ValueError: invalid literal for int() with base 10: '5\n\n6'"),
    ("exec(\"raise ValueError('''a\\n  b''')\")", "ValueError: a b"),
    ("(_ for _ in ()).throw(ValueError('x' * 10**6))", "ValueError: " + "x" * 188),
    ("sys.exit(1)", "SystemExit: 1"),
    ("exec('raise KeyboardInterrupt')", "KeyboardInterrupt"),
    ("(_ for _ in ()).throw(type('Mute', (Exception,), {'__str__': None})())", "Mute"),
    ("None", "returned None"),
    ("'1.0'", "returned '1.0'"),
    ("b'1.0'", "returned b'1.0'"),
    ("float('nan')", "returned nan"),
    ("float('-inf')", "returned -inf"),
    ("[1]", "returned [1]"),
    ("1j", "returned 1j"),
    ("10**400", "returned 1" + "0" * 190),
    ("list(range(10**5))", f"returned {list(range(100))}"[:200]),
    ("os._exit(3)", "worker died (exit code 3)"),
    ("os.kill(os.getpid(), 9)", "worker died (signal 9)"),
    ("os.abort()", "worker died (signal 6)"),
    (HANG_IN_PYTHON, "timeout"),
    (HANG_IN_C, "timeout"),
    (HANG_IN_SLEEP, "timeout"),
]


def test_an_answer_with_a_problem_costs_only_itself():
    good = "1 + 1/2"
    responses = [text for response, _ in PROBLEMS for text in (response, good)]
    with evaluating(seconds=1.0, workers=2) as verification:
        verdicts = judge(verification, *responses)
    assert verdicts[1::2] == [Verdict(1.5)] * len(PROBLEMS)
    assert verdicts[::2] == [Verdict(0.0, problem) for _, problem in PROBLEMS]


def test_text_of_any_kind_arrives():
    texts = ["", "\ud800", "\0", "é" * 1_000_000, "\N{GRINNING FACE}" * 1000]
    with Verification(lambda response, answer: response == answer and len(answer)) as verification:
        verdicts = verification.judge([(text, text) for text in texts])
    assert verdicts == [Verdict(float(len(text))) for text in texts]


def test_workers_start_when_needed_stay_and_end(monkeypatch):
    started = []
    popen = subprocess.Popen

    def counted(*args, **settings):
        started.append(popen(*args, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    with evaluating(workers=2) as verification:
        assert not started
        first = judge(verification, "os.getpid()")
        assert len(started) == 1
        assert judge(verification, "os.getpid()") == first == [Verdict(started[0].pid)]
        pids = {
            verdict.reward for verdict in judge(verification, *[f"os.getpid() + 0 * {2**100}"] * 50)
        }
        assert pids <= {process.pid for process in started}
        assert len(started) == 2
        assert all(runs(process.pid) for process in started)
    assert not any(runs(process.pid) for process in started)
    verification.close()
    assert judge(verification, "1") == [Verdict(1.0)]
    verification.close()
    assert not any(runs(process.pid) for process in started)


def test_an_idle_worker_that_dies_is_replaced():
    with evaluating(workers=1) as verification:
        (before,) = judge(verification, "os.getpid()")
        os.kill(int(before.reward), signal.SIGKILL)
        assert wait_until(lambda: not runs(int(before.reward)))
        (after,) = judge(verification, "os.getpid()")
    assert after.problem is None
    assert after.reward != before.reward


def test_starting_does_not_count_toward_the_limit(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\ntime.sleep(1.2)\ndef verifier(response, answer):\n    return len(response)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import slow_to_import

    with Verification(slow_to_import.verifier, seconds=1.0, workers=1) as verification:
        assert judge(verification, "1", "22") == [Verdict(1.0), Verdict(2.0)]
        monkeypatch.delitem(sys.modules, "slow_to_import")


def test_a_verifier_that_no_worker_can_load(tmp_path, monkeypatch):
    (tmp_path / "soon_gone.py").write_text("def verifier(response, answer):\n    return 1\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        import soon_gone
    with (
        Verification(soon_gone.verifier) as verification,
        pytest.raises(
            RuntimeError, match=r"could not load .*No module named 'soon_gone'.*sys\.path"
        ),
    ):
        judge(verification, "1", "2")


@pytest.fixture
def interruptible():
    """Has SIGINT raise KeyboardInterrupt, also in a test run that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_process_of_a_worker(capfd):
    with evaluating(workers=1) as verification:
        quiet, interrupted, path, imports, sacrificed = judge(
            verification,
            "[print('loud'), os.system('echo loud; echo loud >&2')][1]",
            f"[os.kill(os.getpid(), {int(signal.SIGINT)}), 5][1]",
            f"sys.path == {sys.path!r}",
            "bool({'torch', 'transformers', 'math_verify'} & set(sys.modules))",
            "int(open('/proc/self/oom_score_adj').read())",
        )
    assert quiet == Verdict(0.0)
    assert capfd.readouterr() == ("", "")
    assert interrupted == Verdict(5.0)
    assert path == Verdict(1.0)
    assert imports == Verdict(0.0)
    assert sacrificed == Verdict(1000.0)


@pytest.mark.parametrize(
    ("then", "problem"), [(HANG_IN_C, "timeout"), ("os._exit(3)", "worker died (exit code 3)")]
)
def test_what_a_worker_has_started_ends_with_it(tmp_path, then, problem):
    path = tmp_path / "pid"
    response = f"note(subprocess.Popen(['sleep', '1000']).pid) or {then}"
    with evaluating(seconds=1.0) as verification:
        assert judge(verification, response, answer=path) == [Verdict(0.0, problem)]
        assert wait_until(lambda: not any(map(runs, written(path))))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_checks(tmp_path):
    path = tmp_path / "pid"

    def interrupt():
        written(path)
        os.kill(os.getpid(), signal.SIGINT)

    with evaluating(seconds=100, workers=2) as verification:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            judge(verification, "1", f"note(os.getpid()) or {HANG_IN_C}", "2", answer=path)
        thread.join()
        assert not any(map(runs, written(path)))
        assert judge(verification, "4", "5") == [Verdict(4.0), Verdict(5.0)]


def test_an_exception_of_the_callback_leaves_nothing_to_the_next_call():
    def fail():
        raise OSError("no terminal")

    with evaluating(workers=2) as verification:
        with pytest.raises(OSError, match="no terminal"):
            judge(verification, *["1"] * 10, advance=fail)
        assert judge(verification, "2", "3", "4") == [Verdict(2.0), Verdict(3.0), Verdict(4.0)]


def test_an_answer_in_time_counts_however_long_the_callback_takes():
    with evaluating(seconds=0.5, workers=2) as verification:
        verdicts = judge(verification, *["7"] * 2, advance=lambda: time.sleep(0.7))
    assert verdicts == [Verdict(7.0)] * 2


PROGRAM = """
    import os, subprocess, sys, time
    from vcore_train.verifiers import Verification

    with open({log!r}, "a") as log:
        log.write("main\\n")

    def verifier(response, answer):
        child = subprocess.Popen(["sleep", "1000"])
        with open(answer, "w") as file:
            file.write(f"{{os.getpid()}} {{child.pid}}\\n")
        return eval(response)

    verification = Verification(verifier, seconds=1000)
    verification.judge([({response!r}, {pids!r})])
    open({done!r}, "w").close()
    sys.stdin.read()
"""


@pytest.mark.parametrize("then", ["0", HANG_IN_C, HANG_IN_SLEEP], ids=["idle", "in C", "sleeping"])
def test_workers_and_their_children_end_with_a_killed_parent(tmp_path, then):
    log, pids, done = tmp_path / "log", tmp_path / "pids", tmp_path / "done"
    program = tmp_path / "program.py"
    names = {"log": str(log), "pids": str(pids), "done": str(done), "response": then}
    program.write_text(textwrap.dedent(PROGRAM).format(**names))
    with subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        try:
            worker, child = written(pids)
            assert then != "0" or wait_until(done.exists)
            assert runs(worker)
            assert runs(child)
        finally:
            parent.kill()
    assert wait_until(lambda: not runs(worker) and not runs(child))
    assert log.read_text() == "main\n"  # the worker has not run the program again
