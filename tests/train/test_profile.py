"""``vcore profile``: the phases of a real step, and the table of events whose figures are known."""

import csv
import gzip
import json

import matplotlib.image
import pytest
import torch
from command import vcore, write_problems
from rollouts import make_trainer
from tiny import tiny_model
from vcore_train import VcoreConfig, VcoreTrainer, profiling
from vcore_train.phase_table import (
    MIB,
    nested,
    read_trace,
    take_apart,
    to_csv,
    to_markdown,
)
from vcore_train.profiling import profile_training, profile_with_proton
from vcore_train.timeline import plot_timeline

TINY = ["--layers", "1", "--hidden", "32", "--heads", "2", "--batch-size", "4", "--cpu"]
STEP = {"training_pass", "clip", "optimizer", "other"}
PROBED = {"direction", "utilities", "weights"}


# ---- events whose figures are known ----


def event(name, start, length, *, thread=1, category="cpu_op", **args):
    return {
        "ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, "ts": start,
        "dur": length, "args": args,
    }  # fmt: skip


def spanned(name, start, length, **options):
    return event(name, start, length, category="user_annotation", **options)


def memory(time, change, *, device=0):
    args = {"Bytes": change, "Device Type": device}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": time, "args": args}


def known_events():
    """Two steps of 10 ms: direction 4, weights 1 of which 0.5 in a nested one, the rest other."""
    events = []
    for number, at in enumerate((1000.0, 11000.0)):
        events += [
            spanned(f"ProfilerStep#{number}", at, 10000.0),
            spanned("vcore::direction", at + 1000, 4000.0),
            event("aten::linear", at + 1000, 3000.0),
            event("aten::mm", at + 1500, 2000.0),
            # another thread, at the time of the direction; its own nesting
            event("aten::mul", at + 2000, 1000.0, thread=2),
            event("aten::copy_", at + 2100, 400.0, thread=2),
            spanned("vcore::training_pass", at + 6000, 2000.0),
            spanned("vcore::vcore_loss", at + 6000, 500.0),
            spanned("vcore::weights", at + 7000, 500.0),
            spanned("Optimizer.step#AdamW.step", at + 9000, 1000.0),
            # within the step, and outside of every phase
            event("aten::zero_", at + 8200, 200.0),
            memory(at + 1100, 3 * MIB),
            memory(at + 1200, 2 * MIB),
            memory(at + 1300, -4 * MIB),
            memory(at + 6100, 2 * MIB),
            memory(at + 9500, -3 * MIB),
        ]
    events += [memory(10.0, 100 * MIB), event("aten::mm", 30000.0, 100.0), {"ph": "M", "name": "x"}]
    return events


def test_time_of_phases_adds_up_to_the_step():
    profile = take_apart(known_events())
    assert {row.phase: row.ms for row in profile.rows} == pytest.approx(
        {"direction": 4.0, "weights": 0.5, "training_pass": 1.5, "optimizer": 1.0, "other": 3.0}
    )
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    assert profile.step_ms == pytest.approx(10)
    assert {row.phase: row.calls for row in profile.rows if row.phase != "other"} == {
        "direction": 1, "weights": 1, "training_pass": 1, "optimizer": 1,
    }  # fmt: skip


def test_own_time_of_operators_on_two_threads():
    ops = {row.phase: dict(row.ops) for row in take_apart(known_events()).rows}
    assert ops["direction"] == pytest.approx(
        {"aten::mm": 2.0, "aten::linear": 1.0, "aten::mul": 0.6, "aten::copy_": 0.4}
    )
    assert ops["training_pass"] == pytest.approx({"vcore::vcore_loss": 0.5})
    assert ops["other"] == pytest.approx({"aten::zero_": 0.2})
    assert ops["weights"] == {}


def test_memory_is_counted_from_the_first_step_and_from_the_phase():
    """The first step ends where it began, as does the second: 100 MiB before do not count."""
    rows = {row.phase: row for row in take_apart(known_events()).rows}
    assert (rows["direction"].peak, rows["direction"].added) == (5, 5)
    assert (rows["training_pass"].peak, rows["training_pass"].added) == (3, 2)
    assert (rows["weights"].peak, rows["weights"].added) == (3, 0)
    assert (rows["optimizer"].peak, rows["optimizer"].added) == (3, 0)


def test_time_on_a_device_goes_to_the_phase_that_launched():
    """Kernels run late: in the wall-clock time of another phase. Device memory is what counts."""
    events = known_events()
    for at in (1000.0, 11000.0):
        launch = {"thread": 1, "category": "cuda_runtime", "correlation": at}
        events.append(event("cudaLaunchKernel", at + 1600, 10.0, **launch))
        kernel = {"thread": 9, "category": "kernel", "correlation": at}
        events.append(event("gemm", at + 6500, 1500.0, **kernel))
    events.append(memory(1250.0 + 1000, 8 * MIB, device=1))
    profile = take_apart(events)
    device = {row.phase: row.device_ms for row in profile.rows}
    assert device == {phase: 1.5 if phase == "direction" else 0 for phase in device}
    assert max(row.peak for row in profile.rows) == 8
    assert "| device ms |" in to_markdown(profile)
    assert "device ms" not in to_markdown(take_apart(known_events()))


def test_optimizer_span_in_ours_counts_once():
    events = [*known_events(), spanned("vcore::optimizer", 9900.0, 1100.0)]
    row = next(row for row in take_apart(events).rows if row.phase == "optimizer")
    assert row.calls == 1
    assert row.ms == pytest.approx(1.05)


def test_spans_nest_by_thread_whatever_their_order():
    spans = {(s.name, s.start): s for s in nested(reversed(known_events()))}
    linear, mm = spans["aten::linear", 2000.0], spans["aten::mm", 2500.0]
    mul, copy = spans["aten::mul", 3000.0], spans["aten::copy_", 3100.0]
    assert (linear.depth, mm.depth, mul.depth, copy.depth) == (2, 3, 0, 1)
    assert (linear.self_time, mm.self_time) == (1000, 2000)


def test_a_trace_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no ProfilerStep\. Give torch\.profiler\.profile a sch"):
        take_apart([event("aten::mm", 0.0, 1.0)])
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trace\.json: not a Chrome trace"):
        read_trace(tmp_path / "trace.json")


def test_csv_and_markdown_hold_the_same_figures():
    profile = take_apart(known_events())
    rows = list(csv.DictReader(to_csv(profile).splitlines()))
    assert [row["phase"] for row in rows] == [row.phase for row in profile.rows]
    assert float(rows[0]["ms"]) == 4
    assert rows[0]["own_ms"].startswith("aten::mm=2; aten::linear=1")
    lines = to_markdown(profile).splitlines()
    assert "| direction | 4.0 | 40.0% | 1 | 5.0 | 5.0 | mm 2.0, linear 1.0, " in lines[4]
    assert lines[-1].startswith("| step | 10.0 | 100.0% |")


def colours_in(path):
    picture = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return set((picture @ [65536, 256, 1]).flatten().tolist())


def test_the_picture_has_a_bar_for_each_phase_in_its_colour(tmp_path):
    plot_timeline(tmp_path / "timeline.png", take_apart(known_events()))
    found = colours_in(tmp_path / "timeline.png")
    for colour in ("c98a1b", "7a4fa3", "3b6fb6", "2a9d6f"):  # direction ... optimizer
        assert int(colour, 16) in found
    assert 0xC8452F not in found  # utilities: there are none


# ---- a real trainer ----


def vcore_trainer(folder, *, steps=3, **options):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(8):
        ids = torch.randint(3, 61, (12,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    args = VcoreConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return VcoreTrainer(model=tiny_model("qwen3"), args=args, train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"method": "vcore"}, STEP | PROBED),
        ({"method": "vcore", "utility_method": "central"}, STEP | PROBED),
        ({"method": "sft", "max_grad_norm": 0.0}, STEP - {"clip"}),
    ],
    ids=["vcore", "central", "sft"],
)
def test_phases_of_a_step(options, phases, tmp_path):
    steps = 4 if options["method"] == "sft" else 3
    profile = profile_training(vcore_trainer(tmp_path, steps=steps, **options), tmp_path / "t.json")
    assert {row.phase for row in profile.rows} == phases
    assert len(profile.steps) == steps - 2
    assert sum(row.ms for row in profile.rows) == pytest.approx(profile.step_ms)
    named = {row.phase: row for row in profile.rows if row.phase != "other"}
    assert all(row.calls == 1 for row in named.values())
    assert sum(row.share for row in named.values()) > 0.5
    steps = [(s.start, s.end) for s in profile.steps]
    for span in (s for s in profile.spans if s.phase):
        assert any(start <= span.start and span.end <= end for start, end in steps)
    names = {s.name for s in profile.spans}
    if options["method"] == "vcore":
        assert {"vcore::vcore_loss", "vcore::weighted_linear_nll"} <= names
        probe = {"vcore::perturb_"} if "utility_method" in options else {"vcore::rms_norm_jvp"}
        assert probe <= names


def test_micro_batches_are_calls(tmp_path):
    trainer = vcore_trainer(tmp_path, gradient_accumulation_steps=2)
    callbacks = list(trainer.callback_handler.callbacks)
    rows = profile_training(trainer, tmp_path / "trace.json.gz").rows
    calls = {row.phase: row.calls for row in rows}
    assert (calls["training_pass"], calls["utilities"], calls["optimizer"]) == (2, 1, 1)
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "vcore::utilities" for event in events["traceEvents"])
    assert trainer.callback_handler.callbacks == callbacks  # as before
    assert not torch.autograd._profiler_enabled()


def test_phases_of_gvm(tmp_path):
    options = {"iterations": 3, "steps_per_iteration": 1, "stage1_samples": 2}
    trainer = make_trainer(tmp_path, max_grad_norm=1.0, logging_strategy="no", **options)
    rows = profile_training(trainer, tmp_path / "trace.json.gz").rows
    expected = {"e_step", "sampling", "verification", "gradient_norms", "allocation"}
    found = {row.phase for row in rows}
    assert found == expected | {"training_pass", "clip", "optimizer", "logp", "other"}


def test_a_profile_needs_steps_and_a_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"max_steps of the trainer's arguments must be at least 3"
    ):
        profile_training(vcore_trainer(tmp_path, steps=2), tmp_path / "trace.json")
    with pytest.raises(ValueError, match=r"must end in \.json or \.json\.gz"):
        profile_training(vcore_trainer(tmp_path), tmp_path / "trace.txt")


# ---- the command ----


def test_command_writes_trace_table_and_picture(tmp_path, monkeypatch, capsys):
    made = []
    real = profiling.new_model
    monkeypatch.setattr(profiling, "new_model", lambda *a, **k: made.append(1) or real(*a, **k))
    out = tmp_path / "x[/b]"  # not markup
    problems = write_problems(tmp_path / "problems.jsonl", 12)
    assert vcore("profile", "--data", problems, "--out", out, "--steps", 1, *TINY) == 0
    printed = capsys.readouterr().out
    assert f"In {out}: trace.json.gz" in printed
    assert made == [1]  # a large one takes minutes to load
    for phase in sorted(STEP | PROBED):
        assert phase in printed
        assert f"| {phase} |" in (out / "phases.md").read_text()
    assert {file.name for file in out.iterdir()} == {
        "trace.json.gz", "phases.md", "phases.csv", "timeline.png",
    }  # fmt: skip
    rows = list(csv.DictReader((out / "phases.csv").read_text().splitlines()))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert len(colours_in(out / "timeline.png")) > 20

    assert vcore("profile", "--out", out, "--steps", 1, *TINY) == 1
    assert "holds an earlier profile. Replace it with --overwrite" in capsys.readouterr().err


def test_an_interrupted_profile_leaves_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    (out / "proton.hatchet").write_text("of an earlier run")

    def interrupted(path, profile):
        assert path.parent.parent == out
        assert (path.parent / "trace.json.gz").exists()
        raise KeyboardInterrupt

    command = ["profile", "--out", out, "--steps", 1, *TINY, "--method", "sft"]
    assert vcore(*command) == 1
    assert "holds an earlier profile" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(profiling, "plot_timeline", interrupted)
        assert vcore(*command, "--overwrite") == 130
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "told"),
    [([], None), (["--reuse-forward"], True), (["--no-reuse-forward"], False)],
    ids=["left", "on", "off"],
)
def test_reuse_forward_is_the_configurations_where_it_is_left_out(
    options, told, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(profiling, "run_profile", lambda options, _: asked.append(options))
    assert vcore("profile", "--out", tmp_path, *options, *TINY) == 0
    assert asked[0].arguments.get("reuse_forward") is told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0."),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0."),
        (["--lora-rank", "4"], "--lora-rank means nothing without --lora"),
        (["--method", "sft", "--every", "2"], "--every means nothing without --method vcore"),
        (
            ["--utility-method", "central", "--no-reuse-forward"],
            "--reuse-forward means nothing without --utility-method jvp",
        ),
        (["--limit", "3", "--batch-size", "4"], "3 rows that fit the model's window, and a step"),
        (["--hidden", "30", "--heads", "4"], "--hidden 30 is not an even multiple of --heads 4"),
    ],
    ids=["no-steps", "no-rows", "rank", "every", "reuse", "few-rows", "heads"],
)
def test_command_refuses(arguments, message, tmp_path, capsys):
    assert vcore("profile", "--out", tmp_path / "out", "--cpu", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert vcore("profile", "--out", tmp_path / "out", "--cpu") == 1
    assert "is a file, expected a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Proton runs")
def test_proton_says_why_not(tmp_path, capsys):
    assert vcore("profile", "--proton", "--out", tmp_path / "out", *TINY) == 1
    assert "--proton: no GPU is usable here" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no GPU is usable here"):
        profile_with_proton(vcore_trainer(tmp_path), tmp_path / "tree")


def test_proton_is_started_with_the_launch_hook(tmp_path, monkeypatch):
    """What would run on a GPU, Proton itself replaced."""
    proton = pytest.importorskip("triton.profiler")
    calls = []
    monkeypatch.setattr(profiling, "why_no_proton", lambda: None)
    monkeypatch.setattr(proton, "start", lambda name, hook: calls.append((name, hook)) or 5)
    monkeypatch.setattr(proton, "finalize", calls.append)
    trainer = vcore_trainer(tmp_path, steps=1)
    assert profile_with_proton(trainer, tmp_path / "tree") == tmp_path / "tree.hatchet"
    assert calls == [(str(tmp_path / "tree"), "triton"), 5]
    assert trainer.state.global_step == 1
