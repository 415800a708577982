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
    with (store.folder / "responses.jsonl").open("ab") as file:
        file.write(b'{"prompt": 3, "stage": 1}\n\x00\x00\x00{"round": 5, "chunk": 0}\n')
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


def test_in_the_middle_of_an_m_step_the_policy_is_not_asked_for(store):
    assert again(store, None).rounds == store.rounds


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
    assert fingerprint(model) == frozen
    assert fingerprint(model.bfloat16()) != frozen
