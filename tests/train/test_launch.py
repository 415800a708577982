"""vcore train in several processes, as torchrun and accelerate launch start them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from vcore_train.arithmetic import generate_problems
from vcore_train.cli import main
from vcore_train.config import VcoreConfig
from vcore_train.console import console
from vcore_train.interrupt import StopAtInterrupt
from vcore_train.launch import check_same, on_main, process_count, together
from vcore_train.run_log import read_metrics
from vcore_train.training import sharding_arguments

EXAMPLES = Path(__file__).parents[2] / "examples" / "launch"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port"]
COMMAND = ["-m", "vcore_train.cli", "train"]
FOREVER = ["--steps", 10**6, "--schedule", "constant_with_warmup"]
ALONE = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def options_file(folder):
    rows = ({"prompt": p.prompt, "response": p.response} for p in generate_problems(48))
    data = folder / "problems.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {
        **{"data": str(data), "eval-data": str(data), "eval-limit": 9, "cpu": True},
        **{"layers": 1, "hidden": 32, "heads": 2, "vocab-size": 300, "window": 256},
        **{"log-every": 1, "save-every": 2, "probe-batch-size": 4, "method": "vcore"},
    }
    file = folder / "run.json"
    file.write_text(json.dumps(options))
    sft = {name: v for name, v in options.items() if name != "probe-batch-size"}
    (folder / "sft.json").write_text(json.dumps({**sft, "method": "sft"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return options_file(tmp_path_factory.mktemp("launch"))


def start(launcher, *arguments):
    environment = {name: v for name, v in os.environ.items() if name not in ALONE}
    return subprocess.Popen(
        [sys.executable, *launcher, *COMMAND, *(str(argument) for argument in arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what a terminal would do with signals is none of the test's
    )


def finish(process, timeout=120):
    """Exit code, stdout and stderr; nothing survives a run that hangs."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            for rank in ranks_of(process).values():
                os.kill(rank, signal.SIGKILL)
            process.kill()
    return process.returncode, out, err


def run(launcher, *arguments):
    return finish(start(launcher, *arguments))


def ranks_of(launcher):
    """The process of each rank below ``launcher``."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        content = Path(f"/proc/{child}/environ").read_bytes()
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", content)
        if rank is not None:
            found[int(rank[1])] = child
    return found


def wait_for(condition, process, timeout=90):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alone(*arguments):
    """The exit code of ``vcore`` in this process."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return exited.value.code or 0


def held_out_loss(out):
    return json.loads((out / "summary.json").read_text())["eval_loss"]


def names(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sft_in_two(folder):
    """Four steps in two processes: folder and what was printed."""
    out = folder / "sft-2"
    arguments = ["--config", folder / "sft.json", "--steps", 4, "--batch-size", 2, "--out", out]
    code, printed, errors = run(TORCHRUN, *arguments)
    assert code == 0, errors
    return out, printed, errors


@pytest.mark.distributed
def test_one_set_of_files_and_one_voice(sft_in_two, folder):
    out, printed, errors = sft_in_two
    assert printed.count("48 rows") == 1
    assert printed.count("held-out loss") == 1
    assert errors == ""
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row] == [
        *(1, 2, 3, 4)
    ]
    one = folder / "sft-1"
    arguments = ["--config", folder / "sft.json", "--steps", 4, "--batch-size", 4, "--out", one]
    assert alone("train", *arguments) == 0
    of_each = re.compile(r"checkpoint-\d+/(rng|vcore)_state")  # files of each process
    assert {n for n in names(out) if not of_each.match(n)} == {
        name for name in names(one) if not of_each.match(name)
    }
    assert held_out_loss(out) == pytest.approx(held_out_loss(one), rel=1e-6)
    a, b = (load_file(run / "model.safetensors") for run in (one, out))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
def test_vcore_by_accelerate_is_vcore_in_one_process(folder):
    losses = []
    for processes in (1, 2):
        out = folder / f"vcore-{processes}"
        arguments = ["--config", folder / "run.json", "--steps", 4, "--kl-budget", 0.1]
        arguments += ["--batch-size", 4 // processes, "--lr", 0.01, "--out", out]
        if processes == 1:
            assert alone("train", *arguments) == 0
        else:
            launcher = [*ACCELERATE, "0", "--config_file", str(EXAMPLES / "ddp.yaml")]
            code, printed, errors = run(launcher, *arguments)
            assert code == 0, errors
            assert printed.count("held-out loss") == 1
        losses.append((held_out_loss(out), load_file(out / "model.safetensors")))
    (one, a), (two, b) = losses
    assert two == pytest.approx(one, rel=1e-5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.distributed
def test_resume_in_two_processes_equals_the_uninterrupted_run(sft_in_two, folder):
    whole = sft_in_two[0]
    out = folder / "resumed"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    record = whole / "config.yaml"
    code, _, errors = run(TORCHRUN, "--config", record, "--out", out, "--resume")
    assert code == 0, errors
    a, b = (load_file(run / "model.safetensors") for run in (whole, out))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row] == [
        *(1, 2, 3, 4)
    ]


@pytest.mark.distributed
def test_a_mistake_is_reported_once(sft_in_two, folder):
    out = sft_in_two[0]
    before = names(out)
    # One that the main process alone can see, and one of the command line.
    processes = [
        start(TORCHRUN, "--config", folder / "sft.json", "--out", out),
        start(TORCHRUN, folder / "problems.jsonl", "--method", "magic"),
    ]
    (code, printed, errors), (usage, _, explained) = (finish(process) for process in processes)
    assert code == 1
    assert errors.count("holds an earlier run") == 1
    assert errors.startswith("vcore: ")
    assert printed == ""
    assert names(out) == before
    assert usage == 1  # torchrun's own, whatever its processes end with
    assert explained.count("is not one of") == 1


@pytest.mark.distributed
def test_sigterm_saves_and_resume_goes_on(folder):
    out = folder / "stopped"
    arguments = ["--config", folder / "sft.json", "--batch-size", 2, "--out", out]
    process = start(TORCHRUN, *arguments, *FOREVER, "--save-every", 10**6)
    wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) >= 3, process)
    process.send_signal(signal.SIGTERM)
    code, printed, errors = finish(process)
    assert code != 0
    assert "lost contact" not in errors
    assert printed.count("Stopped at step") == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"]
    step = summary["steps"]
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (out / ".incomplete").exists()
    assert not (out / "model.safetensors").exists()

    code, _, errors = run(TORCHRUN, *arguments, "--steps", step + 2, "--resume")
    assert code == 0, errors
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, step + 3))


@pytest.mark.distributed
def test_a_killed_process_ends_the_run(folder):
    out = folder / "killed"
    arguments = ["--config", folder / "sft.json", "--batch-size", 2, "--out", out]
    process = start(TORCHRUN, *arguments, *FOREVER, "--save-every", 3, "--keep", 2)
    wait_for(lambda: len(list(out.glob("checkpoint-*"))) >= 2, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, _, errors = finish(process, timeout=60)
    assert code != 0
    assert errors.count("vcore: lost contact with another process") == 1
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"Continue from {last} with --resume" in " ".join(errors.split())
    step = int(last.name.split("-")[1])
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == step
    assert load_file(last / "model.safetensors")
    assert torch.load(last / "optimizer.pt")["state"]


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error).__name__, str(error)


def fail_on(failing):
    with together():
        if os.environ["RANK"] == str(failing):
            raise ValueError("the disk is on fire")


def what_processes_agree_on():
    rank = int(os.environ["RANK"])
    return [
        outcome(lambda: fail_on(None)),
        outcome(lambda: fail_on(0)),
        outcome(lambda: fail_on(1)),
        outcome(lambda: on_main(lambda: f"made by {rank}")),
        outcome(lambda: on_main(lambda: 1 / 0)),
        outcome(lambda: check_same({"rows": 7, "tokens": 9}, "Mend.")),
        outcome(lambda: check_same({"rows": 7, "tokens": 9 + rank}, "Mend.")),
    ]


@pytest.mark.distributed
def test_all_processes_fail_where_one_does():
    same, different = None, ("ValueError", "process 1 has 10 tokens, process 0 has 9. Mend.")
    main_process, other = run_ranks(2, what_processes_agree_on)
    assert main_process == [
        None,
        ("ValueError", "the disk is on fire"),
        ("RuntimeError", "process 1: the disk is on fire"),
        "made by 0",
        ("ZeroDivisionError", "division by zero"),
        same,
        different,
    ]
    assert other == [
        None,
        ("OtherProcessError", "process 0: the disk is on fire"),
        ("OtherProcessError", "process 1: the disk is on fire"),
        "made by 0",
        ("OtherProcessError", "process 0: division by zero"),
        same,
        different,
    ]


def stops(signalled):
    interrupt = StopAtInterrupt(console)
    with interrupt:
        if os.environ["RANK"] == str(signalled):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # what a launcher passes on is the same signal
        return interrupt.requested, interrupt.requested_anywhere(torch.device("cpu"))


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all():
    assert run_ranks(2, stops, 1) == [(False, True), (True, True)]


# ---- in one process ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_interrupts_at_once(number, capsys):
    before = signal.getsignal(number)
    interrupt = StopAtInterrupt(console)
    with pytest.raises(KeyboardInterrupt), interrupt:  # noqa: PT012
        os.kill(os.getpid(), number)
        assert interrupt.requested_anywhere(torch.device("cpu"))
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_count() == 1  # a scheduler's variable alone starts nothing
    monkeypatch.setenv("RANK", "0")
    for command in (["demo"], ["info"], ["gvm", "allocate", "x", "--budget", "1"]):
        assert alone(*command) == 1
        error = capsys.readouterr().err
        assert f"vcore {command[0]} works in one process, and the launcher started 2" in error


def test_what_asks_for_sharding_is_passed_on(tmp_path):
    assert sharding_arguments(None, None) == {}
    arguments = sharding_arguments("shard_grad_op", str(EXAMPLES / "fsdp.json"))
    config = VcoreConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
    plugin = config.fsdp_plugin_args
    assert plugin["fsdp_version"] == 2
    assert plugin["reshard_after_forward"] is False
    assert plugin["state_dict_type"] == "FULL_STATE_DICT"
    assert plugin["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    given = tmp_path / "fsdp.json"
    given.write_text('{"fsdp_reshard_after_forward": false}')
    assert sharding_arguments("full_shard", str(given)) == {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": False},
    }


def test_sharding_that_would_be_left_out_is_refused(folder, tmp_path, monkeypatch, capsys):
    command = ["train", folder / "problems.jsonl", "--out", tmp_path / "out"]
    assert alone(*command, "--fsdp-config", "x.json") == 1
    assert "--fsdp-config means nothing without --fsdp" in capsys.readouterr().err
    bad = tmp_path / "fsdp.json"
    bad.write_text("[]")
    assert alone(*command, "--fsdp", "full_shard", "--fsdp-config", bad) == 1
    assert "expected a JSON object" in capsys.readouterr().err
    assert alone(*command, "--cpu", "--fsdp", "full_shard") == 1
    assert "--fsdp shards over GPUs, and this run uses the CPU" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert alone(*command, "--cpu") == 1
    assert "accelerate's configuration (FSDP) shards over GPUs" in capsys.readouterr().err
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert alone(*command) == 1
    assert "shards over several processes, and there is one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
