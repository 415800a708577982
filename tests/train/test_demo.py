import copy
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vcore_train import direction_schedule
from vcore_train.config import VcoreConfig
from vcore_train.demo import (
    METHODS,
    QUICK,
    Outcome,
    accuracy_difference,
    loss_difference,
    reading,
    run_demo,
    standard_error,
)
from vcore_train.evaluation import RowLosses, greedy_responses, row_losses
from vcore_train.models import Size, new_model
from vcore_train.run_log import read_metrics
from vcore_train.step_time import interleaved_step_seconds
from vcore_train.tokenizer import train_tokenizer
from vcore_train.trainer import VcoreTrainer


def test_demo_compares_the_methods_and_writes_everything(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    outcomes = run_demo(QUICK, steps=2, seed=1, out=tmp_path, console=console)
    assert [outcome.method for outcome in outcomes] == ["start", *METHODS]
    assert all(math.isfinite(outcome.losses.mean) for outcome in outcomes)
    assert all(outcome.step_seconds > 0 for outcome in outcomes[1:])
    for name in ("plots/loss.png", "plots/accuracy.png", "weights.html", "held_out.jsonl"):
        assert (tmp_path / name).stat().st_size > 100
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for method in METHODS:
        steps = [row["step"] for row in rows if row["method"] == method and "nll" in row]
        assert steps == [1, 2]
        assert (tmp_path / "models" / method / "model.safetensors").exists()
    first = {r["method"]: r["nll"] for r in rows if r.get("step") == 1 and "nll" in r}
    assert first["dft"] == first["iw_sft"] == pytest.approx(first["sft"], rel=1e-5)
    assert first["vcore"] == pytest.approx(first["sft"], rel=1e-5)
    text = screen.getvalue()
    for words in (
        "exact match",
        "tokens/s",
        "time / SFT",
        "VCORE against SFT",
        "One seed",
        "--quick:",
    ):
        assert words in " ".join(text.split())
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == QUICK.held_out
    json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    with pytest.raises(ValueError, match="--steps"):
        run_demo(QUICK, steps=0, seed=0, out=tmp_path, console=console)


def outcome(method, nll, tokens, correct, seconds=1.0):
    losses = RowLosses(torch.tensor(nll, dtype=torch.float64), torch.tensor(tokens))
    return Outcome(method, losses, correct, 10.0, seconds)


def test_differences_are_paired():
    a = outcome("vcore", [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0], [True, True, False, True])
    b = outcome("sft", [1.5, 2.5, 3.5, 4.5], [2.0, 2.0, 2.0, 2.0], [True, False, False, True])
    loss = loss_difference(a, b)
    assert (loss.value, loss.error) == (pytest.approx(-0.25), pytest.approx(0))
    assert loss.clear
    accuracy = accuracy_difference(a, b)
    assert accuracy.value == pytest.approx(0.25)
    assert accuracy.error == pytest.approx(0.25)
    assert not accuracy.clear
    assert standard_error([True, False]) == pytest.approx(math.sqrt(0.125))


def test_reading_says_worse_where_it_is_worse():
    tokens, count = [1.0] * 40, 40
    sft = outcome("sft", [1.0] * count, tokens, [True] * 30 + [False] * 10)
    same = replace(sft, method="iw_sft")
    worse = outcome("vcore", [1.5] * count, tokens, [True] * 5 + [False] * 35, seconds=3.0)
    better = outcome("dft", [0.5] * count, tokens, [True] * 40)
    lines = reading([sft, better, same, worse], QUICK)
    assert "(better)" in lines[0]
    assert lines[1].count("no clear difference") == 2
    assert lines[2].count("(worse)") == 2
    assert "VCORE fell behind SFT" in lines[3]
    assert "3.0 times" in lines[3]
    named = (("sft", worse), ("vcore", better), ("dft", same), ("iw_sft", same))
    won = reading([replace(found, method=method) for method, found in named], QUICK)
    assert "VCORE beat SFT" in won[3]
    level = reading([sft, better, same, replace(sft, method="vcore")], QUICK)
    assert "VCORE neither beat nor fell behind SFT" in level[3]


@pytest.fixture(scope="module")
def small():
    tokenizer = train_tokenizer(["12 + 3 = 15"], vocab_size=260)
    return new_model(Size(2, 32, 2, window=64).config(), tokenizer, seed=3), tokenizer


def test_batched_generation_equals_one_by_one(small):
    model, tokenizer = small
    prompts = [tokenizer(text)["input_ids"] for text in ("1", "12 + 3", "999 = ", "7")]
    together = greedy_responses(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    alone = [greedy_responses(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert len(together) == 4


def test_row_losses_are_in_order_and_right(small):
    model, tokenizer = small
    rows = []
    for text in ("12 + 3 = 15", "1", "99 - 98 = 1"):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    found = row_losses(model, rows, batch_size=2)
    for row, nll, count in zip(rows, found.nll, found.tokens, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = -logp.gather(1, ids[0, 1:, None]).sum()
        assert float(nll) == pytest.approx(float(expected), rel=1e-4)
        assert count == len(row["input_ids"]) - 1
    assert found.mean == pytest.approx(float(found.nll.sum() / found.tokens.sum()))


def test_timed_steps_take_a_fresh_direction_each(small, tmp_path, monkeypatch):
    model, tokenizer = small
    ids = tokenizer("12 + 3 = 15")["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]}] * 12
    trainer = VcoreTrainer(
        model=copy.deepcopy(model),
        args=VcoreConfig(
            output_dir=str(tmp_path),
            direction="ema",
            max_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    trainer.train()
    taken = []
    original = direction_schedule.update_direction
    monkeypatch.setattr(
        direction_schedule,
        "update_direction",
        lambda *args, **kwargs: taken.append(1) or original(*args, **kwargs),
    )
    seconds = interleaved_step_seconds({"vcore": trainer}, rounds=2)
    assert len(taken) == 3
    assert seconds["vcore"] > 0
