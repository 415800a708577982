"""The paper model of memory and traffic against what ranks hold, allocate and send."""

from pathlib import Path

import pytest
import torch
from command import vcore
from ranks import run_ranks
from test_sharding import LINEAR, shard
from tiny import padded_batch, tiny_model, with_lora
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from vcore_train import descent_direction, token_utilities
from vcore_train.modeling import head_of, hidden_states, supervised_labels
from vcore_train.scale import Precision, Unit, activations, empty_model, memory, traffic, units_of
from vcore_train.sharding import within_forward

from vcore_kernels import weighted_linear_nll

FLOAT32 = Precision(trained=4, frozen=4, compute=4, reduced=4)
BATCH = padded_batch((8,), prompt=2)


def model_of(kind):
    """Wide enough for its parameters to outweigh 8 tokens' activations."""
    model = tiny_model(
        "llama" if kind == "untied" else "qwen3",
        attention_dropout=0.0,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        vocab_size=512,
    )
    return with_lora(model, targets=LINEAR) if kind == "lora" else model


class Sent(TorchDispatchMode):
    """Bytes that this rank receives in collectives, by kind, as ring algorithms send them."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks, self.bytes = ranks, {"gathered": 0.0, "reduced": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [t.nbytes for t in torch.utils._pytree.tree_leaves(args) if _is_tensor(t)]
            share = (self.ranks - 1) / self.ranks
            if "allgather" in func.name() or "all_gather" in func.name():
                self.bytes["gathered"] += max(sizes) * share
            elif "reduce_scatter" in func.name():
                self.bytes["reduced"] += max(sizes) * share
            elif "allreduce" in func.name():
                self.bytes["reduced"] += 2 * sum(sizes) * share
        return func(*args, **(kwargs or {}))


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def local_bytes(tensors):
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def peak(function):
    """Bytes that the allocator gave out at once during ``function()``, beyond what stood before.

    The least of three calls: on a busy machine messages linger that were received long ago.
    """
    return min(_peak(function) for _ in range(3))


def _peak(function):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    highest = held = 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    del result
    return highest


def training_pass(model):
    def loss():
        hidden, labels = hidden_states(model, BATCH), supervised_labels(BATCH)
        head = head_of(model)
        weights = (labels != -100).float()
        return weighted_linear_nll(hidden, head.weight, labels, weights, shift=1, **head.options())[
            0
        ]

    within_forward(model, model, loss).backward()


def _rank(kind, ranks):
    model = model_of(kind)
    if ranks > 1:
        shard(model, parts="accelerate")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    direction = descent_direction(model, BATCH)  # the first pass verifies and makes buffers
    token_utilities(model, BATCH, direction)
    with Sent(ranks) as sent:
        descent_direction(model, BATCH)
        probe = dict(sent.bytes)
        token_utilities(model, BATCH, direction)
        training_pass(model)
    gradients = local_bytes([p.grad for p in trained])
    optimizer.step()
    moments = [m for s in optimizer.state.values() for m in (s["exp_avg"], s["exp_avg_sq"])]
    optimizer.zero_grad()
    return {
        "weights": local_bytes(model.parameters()),
        "moments": local_bytes(moments),
        "gradients": gradients,
        "direction": local_bytes(direction.values()),
        "probe peak": peak(lambda: descent_direction(model, BATCH)),
        "dual peak": peak(lambda: token_utilities(model, BATCH, direction)),
        "sent": sent.bytes,
        "sent by the probe": probe,
    }


@pytest.fixture(scope="module", params=["full", "untied", "lora"])
def measured(request):
    return units_of(model_of(request.param)), {
        ranks: run_ranks(ranks, _rank, request.param, ranks) for ranks in (1, 2, 4)
    }


@pytest.mark.distributed
def test_what_a_rank_holds_falls_as_one_over_ranks(measured):
    units, results = measured
    for ranks, of_ranks in results.items():
        expected = memory(units, ranks, precision=FLOAT32)
        for result in of_ranks:
            for name in ("weights", "moments", "gradients", "direction"):
                assert result[name] == pytest.approx(getattr(expected, name), rel=0.01), name
                assert result[name] == pytest.approx(results[1][0][name] / ranks, rel=0.01), name


@pytest.mark.distributed
def test_peaks_stay_below_those_on_paper(measured):
    """Beyond activations, which are those of one process."""
    units, results = measured
    alone = memory(units, 1, precision=FLOAT32)
    for ranks, of_ranks in results.items():
        expected = memory(units, ranks, precision=FLOAT32)
        for result in of_ranks:
            for name, held in (("probe peak", expected.gradients), ("dual peak", 0.0)):
                before = alone.gradients if name == "probe peak" else 0.0
                of_one = results[1][0][name] - before
                assert result[name] <= 1.1 * (held + expected.gathered + of_one), name


@pytest.mark.distributed
def test_bytes_sent_are_those_on_paper(measured):
    units, results = measured
    for ranks in (2, 4):
        expected = traffic(units, ranks, precision=FLOAT32)
        for result in results[ranks]:
            sent = result["sent"]
            gathered = expected.weights + expected.tangents
            assert sent["gathered"] == pytest.approx(gathered, rel=0.1)
            assert sent["reduced"] == pytest.approx(expected.gradients, rel=0.1)


def test_units_of_a_model():
    tied, untied = units_of(model_of("full")), units_of(model_of("untied"))
    assert len(tied) == 13
    assert len(untied) == 14
    assert tied[-1].kept
    assert sum(u.parameters for u in tied) == sum(p.numel() for p in model_of("full").parameters())
    assert sum(u.trained for u in units_of(model_of("lora"))) == sum(
        p.numel() for p in model_of("lora").parameters() if p.requires_grad
    )
    assert units_of(empty_model(model_of("untied").config)) == untied


def test_traffic_by_method_and_schedule():
    units = [Unit(100, 100), Unit(1000, 1000), Unit(200, 200, kept=True)]
    sft = traffic(units, 2, precision=FLOAT32, method="sft")
    assert sft.weights == (1300 + 1100) * 4 / 2
    assert sft.tangents == 0
    assert sft.gradients == 1300 * 4 / 2
    every = traffic(units, 2, precision=FLOAT32, every=4, micro_batches=3)
    assert every.weights == ((3 + 1 / 4) * 2400 + 3 * 1300) * 4 / 2
    assert every.tangents == 3 * 1300 * 4 / 2
    assert every.gradients == (1 + 1 / 4) * 1300 * 4 / 2
    assert memory(units, 1).gathered == 0


def test_activations_shrink_with_context_ranks():
    config = model_of("full").config
    one, four = activations(config, 1024), activations(config, 1024, context_ranks=4)
    assert all(one[name] == 4 * four[name] for name in one)
    assert isinstance(empty_model(config), nn.Module)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("options", [[], ["--lora-rank", "8"]])
def test_the_table_of_the_documentation(capsys, options):
    root = Path(__file__).parents[2]
    config = root / "examples" / "launch" / "qwen3-32b.json"
    assert vcore("scale", config, *options) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    documented = (root / "docs" / "scale.md").read_text().splitlines()
    rows = [row for row in printed if row and row[0] in ("GPUs", "8", "16", "32", "64")]
    assert len(rows) == 5
    for row in rows:
        assert row in [line.split() for line in documented]


def test_scale_says_what_is_wrong(capsys):
    assert vcore("scale", "nowhere.json") == 1
    assert vcore("scale", "nowhere.json", "--gpus", "8,x") == 1
    assert "--gpus must be whole numbers" in capsys.readouterr().err
    assert vcore("scale", "nowhere.json", "--tokens", "0") == 1
    assert "--tokens must be at least 1" in capsys.readouterr().err
