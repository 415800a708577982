"""The answer that a solution ends with, and one spelling of it for exact comparison."""

import re
import string

_HASHES = "####"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character of the answer
_WORD = re.compile(r"[^\s$]*")
_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")


def final_answer(text: str) -> str | None:
    r"""The answer after the last mark in ``text``; None without one, or where it is empty.

    A mark is ``####``, whose answer is the rest of its line (GSM8K), or ``\boxed`` or ``\fbox``,
    whose answer is in its braces or the word that follows (``\boxed 5``). The mark that stands
    last counts, so that Markdown's ``#### Result`` does not hide the box below it. A box whose
    brace is never closed, as in a response cut short, has no answer.

    Never raises, and takes time linear in the length of ``text``.
    """
    hashes = text.rfind(_HASHES)
    box = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if hashes > box:
        answer = text[hashes + len(_HASHES) :].partition("\n")[0]
    else:
        answer = _boxed(text, box) if box >= 0 else ""
    return answer.strip() or None


def _boxed(text: str, box: int) -> str:
    """The content of the box that begins at ``box``; empty where its braces do not balance."""
    mark = _BOX.match(text, box)
    assert mark is not None
    start = mark.end()
    if not text.startswith("{", start):
        word = _WORD.match(text, start)
        assert word is not None
        return word[0]
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[start + 1 : brace.start()]
    return ""


def bare(answer: str) -> str:
    """``answer`` without the spaces and dollar signs around it and the period that closes it."""
    around = string.whitespace + "$"
    return answer.lstrip(around).rstrip(around + ".")


def normalised(answer: str) -> str:
    r"""One spelling for answers that differ in writing alone, for comparison as text.

    Beyond :func:`bare`, a percent sign at the end is dropped, as a currency's dollar sign is in
    front (``5\%`` and ``$5`` are ``5``): which unit is meant is the question's business. Numbers
    lose the commas between their thousands, a plus sign, needless zeros and the sign of zero, so
    that ``+1,234.50`` is ``1234.5`` and ``-0.0`` is ``0``. Nothing is computed: ``1/2`` and
    ``0.5`` differ.
    """
    answer = answer.replace(r"\$", "$").replace(r"\%", "%").replace("\N{MINUS SIGN}", "-")
    answer = bare(answer).rstrip("%" + string.whitespace)
    number = _NUMBER.fullmatch(answer)
    if number is None or not (number[2] or number[3]):
        return answer
    whole = re.sub("[{},]", "", number[2]).lstrip("0") or "0"
    fraction = (number[3] or "").rstrip("0")
    size = f"{whole}.{fraction}" if fraction else whole
    return f"-{size}" if number[1] == "-" and size != "0" else size
