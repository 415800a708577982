"""descent_direction: the gradient of the uniform loss, its average, and what optimizers know."""

import copy
import json
import logging

import pytest
import torch
from exact import double_copy, exact_nll, random_direction
from tiny import packed_batch, padded_batch, tiny_model, untied_twin, with_lora
from vcore_train.config import DIRECTIONS, VcoreConfig
from vcore_train.direction_schedule import DirectionSchedule
from vcore_train.direction_states import KINDS, MomentumDirection, ProbeDirection
from vcore_train.directions import (
    EmaDirection,
    descent_direction,
    uniform_gradient,
    update_direction,
)
from vcore_train.modeling import supervised_labels, token_nll, trainable_parameters
from vcore_train.utilities import token_utilities

from vcore_kernels.perturbed import NonFiniteDirectionError


def batches():
    return [padded_batch((9, 5, 7), side="left"), padded_batch((4,), seed=1), packed_batch((6, 8))]


def exact_gradient(model, batches):
    """Gradient of the mean over all supervised tokens, in float64 from the model's own logits."""
    double = double_copy(model)
    total = sum(exact_nll(double, batch).sum() for batch in batches)
    tokens = sum(int((supervised_labels(batch) != -100).sum()) for batch in batches)
    parameters = trainable_parameters(double)
    gradients = torch.autograd.grad(total / tokens, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def assert_close(got, want, **tolerances):
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor.double(),
            want[name].double(),
            msg=lambda text, name=name: f"{name}: {text}",
            **tolerances,
        )


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma2"])
def test_probe_is_the_gradient_of_the_uniform_loss(model_type, lora, reentrant):
    model = tiny_model(model_type)
    if lora:
        model = with_lora(model, targets=("q_proj", "down_proj"), lora_dropout=0.5)
    if reentrant is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    exact = exact_gradient(model, batches())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    rng = torch.get_rng_state()
    direction = descent_direction(model, batches())
    assert_close(direction, exact, rtol=1e-4, atol=1e-5)
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(g.requires_grad for g in direction.values())


def test_a_step_against_the_direction_descends_and_utilities_say_so():
    model, batch = tiny_model("qwen3"), padded_batch()
    direction = descent_direction(model, batch)
    before = token_nll(model, batch).sum()
    utility = token_utilities(model, batch, direction)
    tokens = int((supervised_labels(batch) != -100).sum())
    norm = sum(float(g.square().sum()) for g in direction.values())
    torch.testing.assert_close(float(utility.sum()) / tokens, norm, rtol=1e-4, atol=0.0)
    with torch.no_grad():
        for name, p in trainable_parameters(model).items():
            p -= 1e-3 * direction[name]
    assert token_nll(model, batch).sum() < before


def test_batches_without_supervised_tokens():
    model, batch = tiny_model("qwen3"), padded_batch()
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    only_first = {**empty, "labels": empty["labels"].clone()}
    only_first["labels"][:, 0] = 5
    assert_close(
        descent_direction(model, [batch, empty, only_first]), descent_direction(model, batch)
    )
    with pytest.raises(ValueError, match="none of the 2 batches has a supervised token"):
        descent_direction(model, [empty, only_first])
    with pytest.raises(ValueError, match="none of the 0 batches"):
        descent_direction(model, [])
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        descent_direction(model.requires_grad_(False), batch)


def test_clipping_and_num_items():
    model, batch = tiny_model("qwen3"), padded_batch()
    plain = descent_direction(model, batch)
    norm = torch.nn.utils.get_total_norm(plain.values())
    clipped = descent_direction(model, batch, max_norm=0.1)
    assert_close(clipped, {n: g * 0.1 / norm for n, g in plain.items()})
    assert_close(descent_direction(model, batch, max_norm=1e6), plain)
    tokens = int((supervised_labels(batch) != -100).sum())
    assert_close(
        uniform_gradient(model, batch, num_items=2 * tokens), {n: g / 2 for n, g in plain.items()}
    )
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert not any(g.any() for g in uniform_gradient(model, empty, num_items=5).values())
    with pytest.raises(ValueError, match="num_items must be positive"):
        uniform_gradient(model, batch, num_items=0)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        descent_direction(model, batch, max_norm=0.0)


def test_bf16_weights_give_fp32_directions():
    model = tiny_model("llama", dtype=torch.bfloat16)
    direction = descent_direction(model, batches())
    assert {g.dtype for g in direction.values()} == {torch.float32}
    exact = exact_gradient(model, batches())
    a, b = (torch.cat([g.flatten().double() for g in d.values()]) for d in (direction, exact))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.999


# ---- the average ----


def test_ema_is_the_debiased_average(tmp_path):
    model, all_batches = tiny_model("qwen3"), batches()
    ema = EmaDirection(0.8)
    with pytest.raises(ValueError, match="no gradient yet"):
        ema.direction()
    gradients = [descent_direction(model, batch) for batch in all_batches]
    for count, batch in enumerate(all_batches, 1):
        direction = descent_direction(model, batch, kind="ema", ema=ema)
        weights = torch.tensor([0.8 ** (count - 1 - i) for i in range(count)])
        weights /= weights.sum()
        expected = {
            n: sum(w * g[n] for w, g in zip(weights, gradients, strict=False)) for n in direction
        }
        assert_close(direction, expected, rtol=1e-4, atol=1e-6)
        if count == 1:
            assert all(torch.equal(direction[n], gradients[0][n]) for n in direction)

    path = tmp_path / "ema.safetensors"
    ema.save(path)
    loaded, copied = EmaDirection.load(path), EmaDirection(0.1)
    copied.load_state_dict(ema.state_dict())
    for other in (loaded, copied):
        assert (other.decay, other.updates) == (0.8, 3)
        other.update(gradients[0])
    ema.update(gradients[0])
    for other in (loaded, copied):
        assert all(torch.equal(g, other.direction()[n]) for n, g in ema.direction().items())
    assert [p.name for p in tmp_path.iterdir()] == ["ema.safetensors"]


def test_a_first_update_over_several_batches_counts_as_so_many():
    """As many as the whole past of the average counts at most: then it fades as fast as any."""
    gradients = [{"w": torch.tensor([float(i == j) for j in range(3)])} for i in range(3)]

    def after(weight, decay=0.8):
        ema = EmaDirection(decay)
        ema.update(gradients[0], weight=weight)
        ema.update(gradients[1])
        ema.update(gradients[2])
        return ema.direction()["w"]

    counts = torch.tensor([0.64 * 3, 0.8, 1.0])
    torch.testing.assert_close(after(3), counts / counts.sum())
    stationary = torch.tensor([0.64, 0.2 * 0.8, 0.2])
    torch.testing.assert_close(after(5), stationary)
    torch.testing.assert_close(after(1000), stationary)
    torch.testing.assert_close(after(1000, decay=0.0), gradients[2]["w"])
    with pytest.raises(ValueError, match="weight must be positive, got 0"):
        EmaDirection().update(gradients[0], weight=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_saves_and_loads(kind, tmp_path):
    state = KINDS[kind]()
    state.update({"w": torch.arange(3.0), "v": torch.ones(2, dtype=torch.float64)})
    state.update({"w": torch.ones(3), "v": torch.zeros(2, dtype=torch.float64)})
    state.save(tmp_path / "state")
    loaded, copied = KINDS[kind].load(tmp_path / "state"), KINDS[kind]()
    copied.load_state_dict(state.state_dict())
    for other in (loaded, copied):
        assert other.updates == 2
        other.update({"w": torch.ones(3), "v": torch.ones(2, dtype=torch.float64)})
    state.update({"w": torch.ones(3), "v": torch.ones(2, dtype=torch.float64)})
    for other in (loaded, copied):
        assert all(torch.equal(g, other.direction()[n]) for n, g in state.direction().items())
    state.direction()["w"].zero_()
    assert state.direction()["w"].all()
    for other in set(KINDS) - {kind}:
        with pytest.raises(ValueError, match=f"was not written by {KINDS[other].__name__}"):
            KINDS[other].load(tmp_path / "state")
        with pytest.raises(ValueError, match=f"is of kind '{kind}', expected '{other}'"):
            KINDS[other]().load_state_dict(state.state_dict())


def test_the_configuration_knows_every_kind():
    assert set(KINDS) == set(DIRECTIONS)


def test_a_failing_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    ema = EmaDirection()
    ema.update({"w": torch.ones(3)})
    path = tmp_path / "ema.safetensors"
    ema.save(path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata=None):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vcore_train.direction_states.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ema.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ema.safetensors"]


def test_an_average_survives_what_it_is_given():
    ema = EmaDirection()
    gradient = {"w": torch.ones(3), "v": torch.ones(2)}
    ema.update(gradient)
    with pytest.raises(NonFiniteDirectionError, match="2 entries"):
        ema.update({"w": torch.tensor([1.0, torch.nan, torch.inf]), "v": torch.ones(2)})
    with pytest.raises(ValueError, match=r"names or shapes differ.* at v"):
        ema.update({"w": torch.ones(3)})
    assert ema.updates == 1
    assert torch.equal(ema.direction()["w"], gradient["w"])
    ema.direction()["w"].zero_()
    assert torch.equal(ema.direction()["w"], gradient["w"])
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        EmaDirection(1.0)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not written by EmaDirection\.save"):
        EmaDirection.load(tmp_path / "other.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"not written by EmaDirection\.save"):
        EmaDirection.load(tmp_path / "other.pt")


def test_a_parameter_that_nothing_reads_has_a_zero_gradient():
    model = tiny_model("llama")
    model.unused = torch.nn.Linear(3, 3)
    direction = descent_direction(model, padded_batch(), params="unused.*")
    assert direction.keys() == {"unused.weight", "unused.bias"}
    assert not any(bool(g.any()) for g in direction.values())


# ---- optimizers ----


def stepped(model, optimizer, steps=3):
    """Gradients of each step, after taking it."""
    gradients = []
    for seed in range(steps):
        token_nll(model, padded_batch(seed=seed)).mean().backward()
        gradients.append(
            {
                n: p.grad.clone()
                for n, p in trainable_parameters(model).items()
                if p.grad is not None
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    return gradients


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_momentum_and_adam_of_adamw(options):
    model = tiny_model("qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9), **options)
    gradients = stepped(model, optimizer)
    momentum = descent_direction(model, [], kind="momentum", optimizer=optimizer)
    weights = torch.tensor([0.8**2, 0.8, 1.0])
    weights /= weights.sum()
    mean = {n: sum(w * g[n] for w, g in zip(weights, gradients, strict=True)) for n in momentum}
    assert_close(momentum, mean, rtol=1e-3, atol=1e-6)

    adam = descent_direction(model, [], kind="adam", optimizer=optimizer)
    if not options.get("amsgrad"):
        squares = torch.tensor([0.9**2, 0.9, 1.0])
        squares /= squares.sum()
        root = {
            n: sum(w * g[n] ** 2 for w, g in zip(squares, gradients, strict=True)).sqrt()
            for n in mean
        }
        expected = {n: torch.where(root[n] == 0, 0.0, mean[n] / (root[n] + 1e-8)) for n in mean}
        assert_close(adam, expected, rtol=1e-2, atol=1e-4)


def second_moment_root(optimizer, p, eps=1e-8):
    state, group = optimizer.state[p], optimizer.param_groups[0]
    return (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + eps


@pytest.mark.parametrize("kind", ["probe", "ema", "momentum"])
def test_any_kind_is_preconditioned_when_it_is_read(kind):
    model, batch = tiny_model("qwen3"), padded_batch(seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9))
    stepped(model, optimizer)
    options = {"kind": kind, "optimizer": optimizer}
    emas = [EmaDirection(), EmaDirection()] if kind == "ema" else [None, None]
    raw = descent_direction(model, batch, ema=emas[0], **options)
    scaled = descent_direction(model, batch, ema=emas[1], precondition=True, **options)
    for name, p in trainable_parameters(model).items():
        root = second_moment_root(optimizer, p)
        never = optimizer.state[p]["exp_avg_sq"] == 0
        torch.testing.assert_close(scaled[name], torch.where(never, 0.0, raw[name] / root))
    if kind == "ema":  # the average itself holds raw gradients
        assert_close(emas[1].direction(), raw)
        stepped(model, optimizer, steps=1)
        optimizer.param_groups[0]["betas"] = (0.8, 0.99)
        later = descent_direction(model, batch, ema=emas[1], precondition=True, **options)
        assert not torch.equal(later["model.norm.weight"], scaled["model.norm.weight"])
    if kind == "momentum":
        assert_close(scaled, descent_direction(model, [], kind="adam", optimizer=optimizer))


def test_clipping_comes_before_the_average_and_before_preconditioning():
    model, batch = tiny_model("qwen3"), padded_batch(seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped(model, optimizer)
    options = {"optimizer": optimizer, "precondition": True}
    norm = torch.nn.utils.get_total_norm(descent_direction(model, batch).values())
    plain = descent_direction(model, batch, **options)
    clipped = descent_direction(model, batch, max_norm=0.5 * float(norm), **options)
    assert_close(clipped, {n: g / 2 for n, g in plain.items()})


def test_parameters_that_adam_never_updated_do_not_move_when_preconditioned():
    model, batch = tiny_model("qwen3"), padded_batch(seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-30)
    model.model.norm.weight.requires_grad_(False)
    stepped(model, optimizer, steps=1)
    model.model.norm.weight.requires_grad_(True)
    direction = descent_direction(model, batch, optimizer=optimizer, precondition=True)
    assert not direction["model.norm.weight"].any()
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    seen[padded_batch(seed=0)["input_ids"].unique()] = True
    assert all(g.isfinite().all() for g in direction.values())


def test_preconditioning_starts_cold_with_the_raw_direction_and_says_so_once(caplog):
    model, batch = tiny_model("qwen3"), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.INFO, logger="vcore_train"):
        for _ in range(2):
            direction = descent_direction(model, batch, optimizer=optimizer, precondition=True)
    assert caplog.text.count("no state yet; using the raw direction") == 1
    assert_close(direction, descent_direction(model, batch))


def test_preconditioning_that_cannot_be():
    model, batch = tiny_model("qwen3"), padded_batch()
    with pytest.raises(ValueError, match="precondition=True needs optimizer="):
        descent_direction(model, batch, precondition=True)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    stepped(model, sgd, steps=1)
    with pytest.raises(ValueError, match=r"preconditioning reads 'exp_avg_sq'.*momentum_buffer"):
        descent_direction(model, batch, precondition=True, optimizer=sgd)
    with pytest.raises(ValueError, match=r"'adam' is preconditioned already.*'momentum'"):
        descent_direction(model, [], kind="adam", precondition=True, optimizer=sgd)
    other = torch.optim.AdamW(tiny_model("qwen3").parameters())
    with pytest.raises(ValueError, match="are not in the optimizer"):
        descent_direction(model, batch, precondition=True, optimizer=other)


def test_embedding_rows_that_were_never_updated_get_zero():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-12)
    stepped(model, optimizer)
    used = torch.cat([padded_batch(seed=s)["input_ids"].flatten() for s in range(3)]).unique()
    rows = descent_direction(model, [], kind="adam", optimizer=optimizer)[
        "model.embed_tokens.weight"
    ]
    assert rows.isfinite().all()
    assert not rows[[t for t in range(rows.shape[0]) if t not in used]].any()
    assert rows[used[-1]].any()


def test_momentum_of_sgd():
    model = tiny_model("qwen3")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    gradients = stepped(model, optimizer)
    momentum = descent_direction(model, [], kind="momentum", optimizer=optimizer)
    expected = {
        n: 0.5 * (gradients[2][n] + 0.5 * gradients[1][n] + 0.25 * gradients[0][n])
        for n in momentum
    }
    assert_close(momentum, expected)
    before = copy.deepcopy(optimizer.state_dict())
    momentum["model.norm.weight"].zero_()
    after = optimizer.state_dict()
    for number, state in before["state"].items():
        assert torch.equal(state["momentum_buffer"], after["state"][number]["momentum_buffer"])


def test_momentum_of_sgd_with_dampening():
    """The buffer holds the first gradient undamped."""
    model = tiny_model("qwen3")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5, dampening=0.8)
    gradients = stepped(model, optimizer)
    momentum = descent_direction(model, [], kind="momentum", optimizer=optimizer)
    expected = {
        n: 0.5 * (gradients[2][n] + 0.5 * gradients[1][n] + 0.25 / 0.2 * gradients[0][n])
        for n in momentum
    }
    assert_close(momentum, expected)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_moments_before_the_first_step_are_none(kind):
    """As a gradient scaler leaves them that skipped it."""
    model, batch = tiny_model("qwen3"), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer, steps=1)
    for state in optimizer.state.values():
        state["step"].zero_()
    direction = descent_direction(model, batch, kind=kind, optimizer=optimizer)
    assert_close(direction, descent_direction(model, batch))


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_cold_start_falls_back_to_a_probe_and_says_so(kind, caplog):
    model, batch = tiny_model("qwen3"), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.INFO, logger="vcore_train"):
        direction = descent_direction(model, batch, kind=kind, optimizer=optimizer)
    assert "no state yet" in caplog.text
    assert_close(direction, descent_direction(model, batch))


def test_optimizers_that_cannot_serve():
    model = tiny_model("qwen3")
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    stepped(model, sgd, steps=1)
    with pytest.raises(ValueError, match=r"reads 'exp_avg_sq'.*momentum_buffer.*AdamW"):
        descent_direction(model, [], kind="adam", optimizer=sgd)

    rmsprop = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5)
    stepped(model, rmsprop, steps=1)
    with pytest.raises(ValueError, match="momentum_buffer is neither"):
        descent_direction(model, [], kind="momentum", optimizer=rmsprop)

    adam = torch.optim.AdamW(model.parameters())
    stepped(model, adam, steps=1)
    for state in adam.state.values():  # what bitsandbytes keeps
        state["state1"] = state.pop("exp_avg").to(torch.uint8)
        state["state2"] = state.pop("exp_avg_sq").to(torch.uint8)
    for kind in ("momentum", "adam"):
        with pytest.raises(
            ValueError, match=r"state1: Tensor torch\.uint8.*8-bit.*'probe' or 'ema'"
        ):
            descent_direction(model, [], kind=kind, optimizer=adam)

    for p in model.parameters():  # what Lion keeps
        adam.state[p] = {"exp_avg": torch.zeros_like(p)}
    with pytest.raises(ValueError, match=r"keeps no step\. Use kind 'probe' or 'ema'"):
        descent_direction(model, [], kind="momentum", optimizer=adam)

    other = torch.optim.AdamW(tiny_model("qwen3").parameters())
    with pytest.raises(ValueError, match="are not in the optimizer"):
        descent_direction(model, [], kind="momentum", optimizer=other)
    with pytest.raises(ValueError, match="needs optimizer="):
        descent_direction(model, [], kind="momentum")
    with pytest.raises(ValueError, match="needs ema=EmaDirection"):
        descent_direction(model, padded_batch(), kind="ema")
    with pytest.raises(ValueError, match="unknown kind 'gradient'"):
        descent_direction(model, padded_batch(), kind="gradient")


def test_parameters_without_state_are_zero():
    model = tiny_model("qwen3")
    optimizer = torch.optim.AdamW(model.parameters())
    model.model.norm.weight.requires_grad_(False)
    stepped(model, optimizer, steps=1)
    model.model.norm.weight.requires_grad_(True)
    direction = descent_direction(model, [], kind="momentum", optimizer=optimizer)
    assert not direction["model.norm.weight"].any()
    assert direction.keys() == random_direction(trainable_parameters(model)).keys()


# ---- a part of the parameters ----


def all_names(model):
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("last_1_layers", lambda n: n.startswith("model.layers.1.")),
        ("last_2_layers", lambda n: n.startswith("model.layers.")),
        ("model.norm.weight", lambda n: n == "model.norm.weight"),
        ("*.mlp.*", lambda n: ".mlp." in n),
        (["model.norm.weight", "*.0.mlp.*"], lambda n: "0.mlp" in n or n == "model.norm.weight"),
        (["last_1_layers", "all"], lambda n: True),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_part_of_the_gradient_is_that_part_of_it(params, expected, checkpointed):
    model, batch = tiny_model("qwen3"), padded_batch()
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    whole = descent_direction(model, batch)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    part = descent_direction(model, batch, params=params)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert list(part) == [n for n in whole if expected(n)]
    assert_close(part, {n: whole[n] for n in part}, rtol=1e-5, atol=1e-7)


def test_a_tied_head_is_its_use_as_a_head_alone():
    model, batch = tiny_model("qwen3"), padded_batch()
    twin = untied_twin(model)
    apart = descent_direction(twin, batch)
    alone = descent_direction(model, batch, params="lm_head")
    assert_close(alone, {"lm_head.weight": apart["lm_head.weight"]}, rtol=1e-5, atol=1e-7)
    assert_close(descent_direction(model, batch, params="lm_head.weight"), alone)
    assert_close(descent_direction(twin, batch, params="lm_head"), alone)
    for params in ("model.embed_tokens.weight", "*e*.weight", ["lm_head", "all"]):
        whole = descent_direction(model, batch, params=params)
        assert "lm_head.weight" not in whole
        both = apart["lm_head.weight"] + apart["model.embed_tokens.weight"]
        torch.testing.assert_close(whole["model.embed_tokens.weight"], both)
    mixed = descent_direction(model, batch, params=["last_1_layers", "lm_head"])
    assert list(mixed)[-1] == "lm_head.weight"
    assert_close(mixed, {n: apart[n] for n in mixed}, rtol=1e-5, atol=1e-7)


def test_the_head_of_a_lora_model_is_its_adapter():
    model = with_lora(tiny_model("llama"), targets=("q_proj", "lm_head"))
    head = descent_direction(model, padded_batch(), params="lm_head")
    assert sorted(n.split(".")[-3] for n in head) == ["lora_A", "lora_B"]
    assert_close(head, {n: descent_direction(model, padded_batch())[n] for n in head})


@pytest.mark.parametrize(
    ("params", "with_graph"),
    [("all", [0, 1]), ("last_1_layers", [1]), ("lm_head", []), ("model.norm.weight", [])],
)
@pytest.mark.parametrize("lora", [True, False])
def test_what_comes_before_the_first_chosen_parameter_keeps_no_graph(params, with_graph, lora):
    model = tiny_model("llama")
    if lora:
        model = with_lora(model, targets=("q_proj", "lm_head"))
        model.enable_input_require_grads()  # as under gradient checkpointing
        if params == "model.norm.weight":
            params = "*model.norm.weight"
            model.get_base_model().model.norm.weight.requires_grad_(True)
    layers = model.get_decoder().layers
    grown = []

    def note(number, out):
        if out.requires_grad:
            grown.append(number)

    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, out, number=number: note(number, out))
    descent_direction(model, padded_batch(), params=params)
    assert grown == with_graph


def test_params_that_choose_nothing():
    model, batch = tiny_model("qwen3"), padded_batch()
    with pytest.raises(ValueError, match=r"'last_99_layers'.* has 2 layers. Pass last_1_layers to"):
        descent_direction(model, batch, params="last_99_layers")
    with pytest.raises(ValueError, match=r"'last_0_layers', but Qwen3ForCausalLM has 2 layers"):
        descent_direction(model, batch, params="last_0_layers")
    with pytest.raises(ValueError, match=r"'\*\.layers\.7\.\*' chooses no parameter at all"):
        descent_direction(model, batch, params=["lm_head", "*.layers.7.*"])
    with pytest.raises(ValueError, match="params is empty"):
        descent_direction(model, batch, params=[])
    with pytest.raises(TypeError, match="a string or several, got int"):
        descent_direction(model, batch, params=[3])
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen parameters only \(model\.norm\.weight\).*set"):
        descent_direction(model, batch, params="model.norm.weight")
    adapted = with_lora(tiny_model("qwen3"))
    with pytest.raises(ValueError, match=r"'lm_head' chooses frozen parameters only \(.*lm_head"):
        descent_direction(adapted, batch, params="lm_head")
    assert all("lora" in n for n in descent_direction(adapted, batch, params="*.layers.1.*"))


def test_moments_of_a_part():
    model = tiny_model("qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped(model, optimizer)
    whole = descent_direction(model, [], kind="adam", optimizer=optimizer)
    part = descent_direction(
        model, [], kind="adam", optimizer=optimizer, params=["last_1_layers", "lm_head"]
    )
    assert torch.equal(part.pop("lm_head.weight"), whole["model.embed_tokens.weight"])
    assert_close(part, {n: g for n, g in whole.items() if n.startswith("model.layers.1.")})


@pytest.mark.parametrize(
    "state", [ProbeDirection(), MomentumDirection()], ids=["probe", "momentum"]
)
def test_a_kept_direction_is_not_changed_by_training(state):
    model, batch = tiny_model("qwen3"), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped(model, optimizer)
    update_direction(state, model, batch, optimizer=optimizer)
    before = state.direction()
    stepped(model, optimizer)
    assert all(torch.equal(g, before[n]) for n, g in state.direction().items())


def test_options_changed_between_save_and_load(tmp_path, caplog):
    def schedule(**options):
        args = {"output_dir": str(tmp_path), "report_to": [], "direction": "ema", **options}
        return DirectionSchedule(VcoreConfig(**args))

    first = schedule(direction_params="lm_head")
    first.state.update({"lm_head.weight": torch.ones(2)})
    tensors, values = first.state_dict()
    values = json.loads(json.dumps(values))  # as a checkpoint keeps them
    slower = schedule(direction_params="lm_head", ema_decay=0.99)
    slower.load_state_dict(tensors, values, torch.device("cpu"))
    assert slower.state.updates == 1
    assert slower.state.decay == 0.99
    assert not caplog.text
    other = schedule(direction_params="last_1_layers")
    other.load_state_dict(tensors, values, torch.device("cpu"))
    assert other.state.updates == 0
    assert "direction_params='last_1_layers' starts anew" in caplog.text
