"""Responses on disk: whole chunks or none, whatever a killed process left."""

import json

import pytest
import torch
from vcore_train.gvm.store import IterationStore, Rollout, fingerprint


def rollouts(count, prompt=0):
    return [
        Rollout(prompt, 1, [i, i + 1], i % 2 == 0, f"text {i} \n\u2028\ud800", float(i), None)
        for i in range(count)
    ]


@pytest.fixture
def store(tmp_path):
    store = IterationStore(tmp_path / "iteration-0000", "a")
    store.append(0, 0, rollouts(3))
    store.append(0, 1, [])
    store.append(1, 0, rollouts(2, prompt=4))
    return store


def again(store, policy="a"):
    return IterationStore(store.folder, policy)


def test_what_was_appended_is_read(store):
    found = again(store)
    assert found.rounds == store.rounds
    assert found.chunk(0, 0) == rollouts(3)
    assert found.chunk(0, 1) == []
    assert found.chunk(0, 2) is None


def test_a_cut_off_end_is_lost_and_nothing_else(store):
    path = store.folder / "responses.jsonl"
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1  # of the line that ends the third chunk
    second = len(content) - len(content.split(b'"chunk": 1, "responses": 0}\n')[1])
    for size in range(second, len(content)):
        path.write_bytes(content[:size])
        found = again(store)
        assert set(found.rounds) == {(0, 0), (0, 1)}
        found.append(1, 0, rollouts(2, prompt=4))
        assert again(store).rounds == store.rounds
        assert path.read_bytes() == content
    assert last > second


def test_garbage_at_the_end_is_cut_off(store):
    content = (store.folder / "responses.jsonl").read_bytes()
    for garbage in (b'{"prompt": 3, "stage": 1}\n\x00\x00\x00', b"\x00\n\n", b"[1]\nnull\n"):
        with (store.folder / "responses.jsonl").open("ab") as file:
            file.write(garbage)
        assert again(store).rounds == store.rounds
        assert (store.folder / "responses.jsonl").read_bytes() == content


def test_damage_before_a_whole_chunk_is_an_error(store):
    """No kill leaves it, so that nothing may be thrown away."""
    path = store.folder / "responses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in ((0, b"\x00\x00\n"), (2, b""), (3, b'{"chunk": 0}\n')):
        damaged = b"".join([*lines[:number], line, *lines[number + 1 :]])
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"responses\.jsonl: .*line \d.* Repair the file"):
            again(store)
        assert path.read_bytes() == damaged


def test_fields_of_a_later_version_are_left_out(store):
    path = store.folder / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps({**row, 'more': 1})}\n" for row in rows))
    assert again(store).rounds == store.rounds


def test_responses_of_other_weights_are_set_aside(store):
    found = again(store, "b")
    assert found.replaced
    assert found.rounds == {}
    kept = store.folder.with_name("iteration-0000.replaced")
    assert (kept / "responses.jsonl").exists()
    assert not again(store, "b").replaced
    assert again(store, "c").replaced
    assert json.loads((kept / "policy.json").read_text())["policy"] == "b"


def test_in_the_middle_of_an_m_step_nothing_is_changed(store):
    path = store.folder / "responses.jsonl"
    with path.open("ab") as file:
        file.write(b"{")
    content = path.read_bytes()
    for policy in (None, "a"):
        found = IterationStore(store.folder, policy, reading=True)
        assert found.rounds == store.rounds
        assert path.read_bytes() == content
    with pytest.raises(ValueError, match="responses of other weights"):
        IterationStore(store.folder, "b", reading=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"policy": 3}', None])
def test_responses_without_a_policy_are_nobodys(store, content):
    path = store.folder / "policy.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    if content in ("", "{"):
        with pytest.raises(ValueError, match=r"policy\.json: not readable"):
            again(store)
        return
    assert again(store).replaced


def test_side_files_that_cannot_be_read_are_named(store):
    for name, read in (("grad_norms.json", "grad_norms"), ("logp.safetensors", "logp")):
        (store.folder / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name}: not readable .* Remove it"):
            getattr(again(store), read)()
    (store.folder / "responses.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match=r"responses\.parquet: not readable"):
        again(store)


def test_parquet_holds_the_same(store):
    for chunk in store.rounds.values():  # Arrow has no half surrogate pairs
        chunk[:] = [Rollout(**{**vars(r), "text": "text"}) for r in chunk]
    store.to_parquet()
    assert not (store.folder / "responses.jsonl").exists()
    assert again(store).rounds == store.rounds


def test_parquet_of_nothing(tmp_path):
    store = IterationStore(tmp_path / "i", "a")
    store.append(0, 0, [])
    store.to_parquet()
    assert again(store).rounds == {(0, 0): []}


def test_a_kill_between_the_two_formats(store):
    content = (store.folder / "responses.jsonl").read_bytes()
    for chunk in store.rounds.values():
        chunk[:] = [Rollout(**{**vars(r), "text": "text"}) for r in chunk]
    store.to_parquet()
    (store.folder / "responses.jsonl").write_bytes(content)
    assert again(store).rounds == store.rounds
    assert not (store.folder / "responses.jsonl").exists()


def test_norms_and_log_probabilities(store):
    assert store.grad_norms() is None
    assert store.logp() is None
    norms = torch.rand(5, dtype=torch.float64)
    store.save_grad_norms(norms)
    store.save_logp({"old": torch.arange(4.0), "ref": torch.ones(2)})
    found = again(store)
    assert torch.equal(found.grad_norms(), norms)
    assert torch.equal(found.logp()["old"], torch.arange(4.0))


def test_fingerprints_tell_weights_apart():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert fingerprint(model) != before
    model.weight.requires_grad_(False)
    frozen = fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert fingerprint(model) != frozen
    assert fingerprint(model.bfloat16()) != frozen


@pytest.mark.parametrize(
    ("one", "other"), [([1, 1], [2, 2]), ([1, 2], [2, 1]), ([0, 0], [3, 3]), ([1], [1, 1])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_see_order_and_number(one, other, dtype):
    prints = []
    for values in (one, other):
        module = torch.nn.Module()
        module.bias = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
        module.weight = torch.nn.Parameter(torch.tensor([values], dtype=dtype))
        module.scalar = torch.nn.Parameter(torch.tensor(1.0, dtype=dtype))
        prints.append(fingerprint(module))
    assert prints[0] != prints[1]
