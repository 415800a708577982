import pytest
from hypothesis import given
from hypothesis import strategies as st
from vcore_train.answers import bare, final_answer, normalised


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1\nno, wait\n####  -1,234 apples \nmore", "-1,234 apples"),
        ("####7", "7"),
        ("##### 7", "7"),
        (r"so \boxed{7}.", "7"),
        (r"$\boxed{1}$, then $\boxed{\frac{1}{2}}$ is it", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"$\boxed 5$.", "5"),
        (r"\boxed  {7}", "7"),
        ("\\boxed{\n7\n}", "7"),
        (r"\boxed{x = \boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{1} and \fbox{2}", "2"),
        (r"\fbox{1} and \boxed{2}", "2"),
        ("#### Result\nIt is \\boxed{7}", "7"),
        ("\\boxed{6}\n#### 7", "7"),
        (r"#### $\boxed{7}$", "7"),
        ("7", None),
        ("", None),
        ("####", None),
        ("#### \n7", None),
        (r"\boxed", None),
        (r"\boxed{}", None),
        (r"\boxed{7", None),
        (r"\boxed{1} then \boxed{\frac{1}{2}", None),
        (r"\boxed}7{", "}7{"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "hostile",
    [r"\boxed{", r"\boxed", r"\boxed ", "{", "}", "\\", "#", "#### ", r"\fbox{}{", "\ud800", "\0"],
)
def test_final_answer_of_megabytes(hostile):
    text = hostile * (1_000_000 // len(hostile))
    for response in (text, rf"\boxed{{{text}", rf"{text}\boxed{{7}}"):
        found = final_answer(response)
        assert found is None or found in response
    assert final_answer(rf"{text} \boxed{{7}}") == "7"


MARKS = st.sampled_from(["####", "\\boxed", "\\fbox", "{", "}", "\\", " ", "\n", "$", "7", "é"])


@given(st.lists(MARKS).map("".join))
def test_final_answer_never_raises(text):
    found = final_answer(text)
    assert found is None or (found and found in text)


@given(st.lists(MARKS).map("".join), st.recursive(st.just("x"), lambda s: s.map("{{{}}}y".format)))
def test_final_answer_takes_the_last_box(before, content):
    assert final_answer(f"{before} \\boxed{{{content}}} it is") == content


def test_bare():
    assert bare(" $ 5 apples.$\n") == "5 apples"
    assert bare("$$") == bare(" . ") == ""
    assert bare(r"\frac{1}{2}") == r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (" 5 ", "5"),
        ("$5$", "5"),
        ("$5.", "5"),
        (r"\$5", "5"),
        ("5.", "5"),
        ("5.00", "5"),
        ("+5", "5"),
        ("005", "5"),
        ("5%", "5"),
        (r"5 \%.", "5"),
        ("-0", "0"),
        ("-0.00", "0"),
        ("0", "0"),
        (".50", "0.5"),
        ("-.5", "-0.5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("1,234", "1234"),
        ("-1,234,567.80", "-1234567.8"),
        ("1{,}234", "1234"),
        ("100", "100"),
        ("1/2", "1/2"),
        ("1,2", "1,2"),
        ("1,23", "1,23"),
        ("12,3456", "12,3456"),
        ("(1,234)", "(1,234)"),
        ("1.2.3", "1.2.3"),
        ("1e5", "1e5"),
        ("+", "+"),
        ("-.", "-"),
        ("", ""),
        ("$.", ""),
        ("Monday.", "Monday"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_normalised(answer, same):
    assert normalised(answer) == same


@pytest.mark.parametrize(
    "hostile", ["1,234", ",234", "0", "9", ".", "%", "$", " ", "{,}", "-", "é"]
)
def test_normalised_of_megabytes(hostile):
    text = hostile * (1_000_000 // len(hostile))
    assert len(normalised(text)) <= len(text)
    assert normalised(f"{text}x").endswith("x")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_numbers_keep_their_value(number):
    spelling = f"{number:+,.3f}"
    assert normalised(spelling) == normalised(str(number)) or "E" in str(number)
    assert float(normalised(spelling)) == float(number)
