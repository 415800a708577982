import io
import math

import pytest
import torch
from rich.console import Console
from vcore_train.arithmetic import generate_problems
from vcore_train.colours import colour_of, legend_values
from vcore_train.data import Example, encode
from vcore_train.modeling import IGNORE_INDEX
from vcore_train.models import Size, new_model
from vcore_train.show_weights import (
    Token,
    WeightedTrajectory,
    legend,
    terminal_text,
    weigh_trajectory,
)
from vcore_train.tokenizer import train_tokenizer
from vcore_train.weights_page import visible, weights_page


@pytest.fixture(scope="module")
def made():
    problems = generate_problems(9)
    examples = [Example(p.prompt, p.response, f"row {i}") for i, p in enumerate(problems, 1)]
    tokenizer = train_tokenizer((f"{e.prompt}\n{e.response}" for e in examples), vocab_size=300)
    model = new_model(Size(1, 32, 2, window=256).config(), tokenizer, seed=0)
    return model, tokenizer, encode(examples, tokenizer, max_length=256).rows


def test_weights_average_to_one_over_the_response(made):
    model, tokenizer, rows = made
    found = weigh_trajectory(model, tokenizer, rows[0], rows[1:], where="row 1", kl_budget=0.2)
    supervised = [label != IGNORE_INDEX for label in rows[0]["labels"]]
    assert [token.weight is not None for token in found.tokens] == supervised
    weights = [token.weight for token in found.supervised]
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-5)
    assert found.kl == pytest.approx(0.2, abs=1e-4)
    assert 0 < found.ess < 1
    kl = sum(w * math.log(w) for w in weights) / len(weights)
    assert kl == pytest.approx(0.2, abs=1e-3)
    order = sorted(found.supervised, key=lambda token: token.utility)
    assert [t.weight for t in order] == sorted(t.weight for t in order)
    text = "".join(token.text for token in found.tokens)
    assert text == tokenizer.decode(rows[0]["input_ids"])
    with torch.no_grad():
        ids = torch.tensor([rows[0]["input_ids"]])
        nll = -model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    kept = [
        float(x) for x, token in zip(nll, found.tokens[1:], strict=True) if token.weight is not None
    ]
    assert [token.nll for token in found.supervised] == pytest.approx(kept, rel=1e-4)


def test_uniform_without_budget_and_parameters_untouched(made):
    model, tokenizer, rows = made
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = weigh_trajectory(model, tokenizer, rows[0], rows[1:3], tau=0.0)
    assert all(token.weight == pytest.approx(1, abs=1e-6) for token in found.supervised)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


TRAJECTORY = WeightedTrajectory(
    [
        Token("<q> & "),
        Token("1", 0.2, -1e-3, 0.5),
        Token("<b>\n", 3.0, 2e-3, 1.5),
        Token("\n", 1.0, 0.0, 0.0),
    ],
    tau=2.0,
    kl=0.1,
    ess=0.8,
    where="x.jsonl, row 3",
)


def test_page_is_self_contained_and_escaped():
    page = weights_page([TRAJECTORY], title="A & B")
    assert "&lt;q&gt; &amp; " in page
    assert "<b>" not in page
    for outside in ("http:", "https:", "<script", "<link", "@import", "src="):
        assert outside not in page
    for figure in ("weight  3.000", "utility +2.000e-03", "nll     1.500 nats", "x.jsonl, row 3"):
        assert figure in page
    assert page.count('class="t"') == 3


def test_terminal_text_keeps_every_character():
    text = terminal_text(TRAJECTORY)
    assert text.plain == "<q> & 1<b>\n\u23ce\n"
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="truecolor", width=80).print(text)
    assert "\x1b[" in screen.getvalue()
    assert "0.25" in legend().plain


def test_colours_diverge_around_one():
    backgrounds = [colour_of(value)[0] for value in legend_values()]
    assert len(set(backgrounds)) == 9
    assert colour_of(1.0)[0] == "#f7f7f7"
    assert colour_of(0.0)[0] == colour_of(0.25)[0]
    assert colour_of(100.0)[0] == colour_of(4.0)[0]

    def red_minus_blue(weight):
        rgb = colour_of(weight)[0]
        return int(rgb[1:3], 16) - int(rgb[5:7], 16)

    assert red_minus_blue(3.0) > 0 > red_minus_blue(0.3)
    assert visible(" a\n") == "\u2423a\u23ce"
