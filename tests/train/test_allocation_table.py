import csv
import io
import json
import os

import pytest
import torch
from rich.console import Console
from vcore_train.allocation_table import allocate_table
from vcore_train.data import read_rows

from vcore_kernels import NothingToAllocateError, allocate, gvm_allocate, gvm_variance_bound

RATES = [0.5, 0.125, 1.0, 0.0, 0.25]
NORMS = [1.0, 3.0, 0.5, 0.0, 2.0]
P, G = torch.tensor(RATES, dtype=torch.float64), torch.tensor(NORMS, dtype=torch.float64)
ROWS = [
    {"id": f"prompt {i}", "p": p, "G": g} for i, (p, g) in enumerate(zip(RATES, NORMS, strict=True))
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def comma_separated(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(table, budget=40, **options):
    """The counts, and what was shown."""
    shown = io.StringIO()
    chosen = {name: options.pop(name) for name in ("alpha", "max_accept_rate") if name in options}
    console = Console(file=shown, width=140)
    counts = allocate_table(table, budget, options=chosen, console=console, **options)
    return counts, shown.getvalue()


def test_counts_are_those_of_gvm_allocate(tmp_path):
    table = jsonl(tmp_path / "x.jsonl", *ROWS)
    assert run(table)[0] == gvm_allocate(G, P, 40).tolist()
    chosen = {"alpha": 0.1, "max_accept_rate": 0.9}
    assert run(table, **chosen)[0] == gvm_allocate(G, P, 40, **chosen).tolist()
    for rule in ("uniform", "neyman", "knapsack"):
        assert run(table, rule=rule)[0] == allocate(rule, 40, accept_rate=P).tolist()


@pytest.mark.parametrize("names", [("accept_rate", "grad_norm"), ("p", "G"), ("p", "g")])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_kinds_of_tables_and_fields(tmp_path, names, kind):
    import datasets

    rows = [{names[0]: p, names[1]: g} for p, g in zip(RATES, NORMS, strict=True)]
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        jsonl(path, *rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        comma_separated(path, *rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert run(path)[0] == gvm_allocate(G, P, 40).tolist()


def test_numbers_as_text_and_named_fields(tmp_path):
    rows = [{"x": {"p": f" {row['p']}"}, "n": str(row["G"]), "p": "?", "G": "?"} for row in ROWS]
    table = jsonl(tmp_path / "x.jsonl", *rows)
    assert run(table, rate_field="x.p", norm_field="n")[0] == gvm_allocate(G, P, 40).tolist()


def test_rates_from_counts(tmp_path):
    rows = [
        {"accepted": int(8 * p), "sampled": 8 if p else 0, "G": g}
        for p, g in zip(RATES, NORMS, strict=True)
    ]
    table = comma_separated(tmp_path / "x.csv", *rows)
    assert run(table)[0] == gvm_allocate(G, P, 40).tolist()
    given = jsonl(tmp_path / "x.jsonl", *({**row, "p": 0.5} for row in rows))
    assert run(given)[0] == gvm_allocate(G, torch.full_like(P, 0.5), 40).tolist()


def test_the_next_round_of_reinforce_ada(tmp_path):
    rows = [{"accepted": a, "sampled": 8} for a in (0, 1, 4, 7)]
    table = jsonl(tmp_path / "x.jsonl", *rows)
    counts, shown = run(table, 100, rule="reinforce_ada")
    assert counts == [4, 4, 0, 4]
    assert "12 samples" in shown
    assert run(table, 32, rule="reinforce_ada")[0] == [0, 0, 0, 0]
    first = jsonl(tmp_path / "first.jsonl", {"id": 1}, {"id": 2})
    assert run(first, 100, rule="reinforce_ada")[0] == [4, 4]


GOOD = {"p": 0.5, "G": 1.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"no rows to allocate"),
        (
            [GOOD, GOOD, {"p": 0.5}],
            r"row 3: field 'G' is missing or null, expected a finite number",
        ),
        (
            [GOOD, {"p": None, "G": 1}],
            r"row 2: field 'p' is missing or null, expected a number betw",
        ),
        ([GOOD, {"p": "half", "G": 1}], r"row 2: field 'p' is 'half', expected a number between 0"),
        ([GOOD, {"p": "", "G": 1}], r"row 2: field 'p' is '', expected"),
        ([GOOD, {"p": True, "G": 1}], r"row 2: field 'p' is True, expected"),
        ([GOOD, {"p": [0.5], "G": 1}], r"row 2: field 'p' is \[0\.5\], expected"),
        (
            [GOOD, {"p": 1.5, "G": 1}],
            r"row 2: field 'p' is 1\.5, expected a number between 0 and 1",
        ),
        ([GOOD, {"p": float("nan"), "G": 1}], r"row 2: field 'p' is nan, expected"),
        (
            [GOOD, {"p": 0.5, "G": -1}],
            r"row 2: field 'G' is -1, expected a finite number, 0 or more",
        ),
        ([GOOD, {"p": 0.5, "G": float("inf")}], r"row 2: field 'G' is inf, expected"),
        ([GOOD, {"p": 0.5, "G": 10**400}], r"row 2: field 'G' is 10000.*, expected"),
        ([{"P": 0.5, "G": 1}], r"row 1: no field looks like the rate; .*'P', 'G'\. .*--rate-field"),
        ([{"p": 0.5}], r"row 1: no field looks like the norm; .*--norm-field"),
        ([{"sampled": 4, "G": 1}], r"row 1: no field looks like the rate"),
        (
            [{"sampled": 4, "accepted": 5, "G": 1}],
            r"row 1: field 'accepted' is 5, .* at most 'sampl",
        ),
        ([{"sampled": 4.5, "accepted": 2, "G": 1}], r"row 1: field 'sampled' is 4\.5, .* whole"),
        ([{"sampled": -1, "accepted": 0, "G": 1}], r"row 1: field 'sampled' is -1, .* whole"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    path = jsonl(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=message) as raised:
        run(path)
    assert str(path) in str(raised.value)


def test_bad_csv(tmp_path):
    table = tmp_path / "x.csv"
    table.write_text("p,G\n0.5,1\n0.5,\n")
    with pytest.raises(ValueError, match=r"x\.csv, row 2: field 'G' is missing or null"):
        run(table)
    table.write_text("p,G\n0.5,1\n0.5,x\n")
    with pytest.raises(ValueError, match=r"x\.csv, row 2: field 'G' is 'x', expected"):
        run(table)
    for content in ("", "p,G\n", "p,G\n1,2\n1,2,3\n"):
        table.write_text(content)
        with pytest.raises(ValueError, match=r"x\.csv: empty, or not a csv table \(.+\)"):
            run(table)


def test_bad_arguments(tmp_path):
    table = jsonl(tmp_path / "x.jsonl", *ROWS)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        run(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"x\.txt: expected a name that ends in \.jsonl, \.csv"):
        run(table, out=tmp_path / "x.txt")
    with pytest.raises(ValueError, match="rule must be one of"):
        run(table, rule="none")
    with pytest.raises(ValueError, match="'neyman' has no option 'alpha'"):
        run(table, rule="neyman", alpha=1.0)
    with pytest.raises(NothingToAllocateError, match="1 have accept_rate 0, 0 others grad_norm 0"):
        run(table, max_accept_rate=0.0)


def test_summary_and_bounds(tmp_path):
    table = jsonl(tmp_path / "x.jsonl", *ROWS)
    counts, shown = run(table, 100)
    words = " ".join(shown.split())
    assert "prompts 5 budget 100 samples prompts with 0 samples 1 " in words
    sampled = sorted(n for n in counts if n)
    middle = (sampled[1] + sampled[2]) / 2
    assert f"samples of the others {sampled[0]} to {sampled[-1]}, median {middle:g} " in words

    least = gvm_variance_bound(G, P, 100)
    a = G / (P + 1e-3 / P).sqrt()
    assert f"least bound of the variance {least:.4g} " in words
    for name, n in (("this allocation", torch.tensor(counts)), ("uniform", torch.full((5,), 20))):
        bound = float((a.square() / n)[:3].sum() + (a.square() / n)[4])
        assert f"bound of {name} {bound:.4g}, {bound / least:.4g} times the least" in words
    assert "prompt 4" in shown
    assert "more" not in shown


def test_bounds_that_are_infinite_or_not_known(tmp_path):
    table = jsonl(tmp_path / "x.jsonl", *ROWS)
    for chosen in ({"rule": "uniform", "budget": 4}, {"max_accept_rate": 0.5}):
        _, shown = run(table, **chosen)
        assert "infinite: no samples for 1 with p and G above 0" in shown
    assert "bound" not in run(table, 0)[1]
    without = jsonl(tmp_path / "p.jsonl", *({"p": p} for p in RATES))
    counts, shown = run(without, rule="neyman")
    assert counts == allocate("neyman", 40, accept_rate=P).tolist()
    assert "not known" in shown
    gaps = jsonl(tmp_path / "gaps.jsonl", *ROWS, {"p": 0.5, "G": None})
    assert "row 6: field 'G' is missing" in " ".join(run(gaps, rule="neyman")[1].split())
    flat = jsonl(tmp_path / "flat.jsonl", {"p": 0.5, "G": 0})
    assert "bound of uniform 0" in " ".join(run(flat, rule="uniform")[1].split())


def test_many_rows_are_cut_and_text_is_shown_as_it_is(tmp_path):
    rows = [{"question": f"[bold]{i}[/]\n\ud800", **GOOD} for i in range(25)]
    _, shown = run(jsonl(tmp_path / "x.jsonl", *rows), 100)
    assert "[bold]19[/] \\ud800" in shown
    assert "[bold]20[/]" not in shown
    assert "... and 5 more" in shown


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_counts_are_written(tmp_path, kind):
    rows = [{**row, "count": "old", "tags": ["a", "b"]} for row in ROWS]
    rows[1]["note"] = "only here, with a\nbreak"
    out = tmp_path / "new" / f"out.{kind}"
    counts, shown = run(jsonl(tmp_path / "x.jsonl", *rows), out=out)
    assert str(out) in shown.replace("\n", "")
    written = [row for _, row in read_rows(out)]
    assert [row["count"] for row in written] == counts
    assert [row["p"] for row in written] == RATES
    assert written[1]["note"] == rows[1]["note"]
    assert written[0]["tags"] == ('["a", "b"]' if kind == "csv" else ["a", "b"])
    assert os.listdir(out.parent) == [out.name]
    again, _ = run(out, out=out)
    assert again == counts


def test_a_failed_write_leaves_the_old_file(tmp_path):
    rows = [{**GOOD, "mixed": 1}, {**GOOD, "mixed": "text"}]
    out = tmp_path / "out.parquet"
    out.write_text("old")
    with pytest.raises(ValueError, match=r"do not fit into columns of parquet .* Write \.jsonl"):
        run(jsonl(tmp_path / "x.jsonl", *rows), out=out)
    assert out.read_text() == "old"
    assert not list(tmp_path.glob("*.tmp"))
