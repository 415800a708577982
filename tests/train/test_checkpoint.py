from pathlib import Path

import pytest
import torch
from vcore_train.checkpoint import load_state, recover, save_state, staged_folder


def test_staged_folder_replaces_and_restores(tmp_path):
    final = tmp_path / "final"
    with staged_folder(final) as folder:
        (folder / "a").write_text("old")
        assert not final.exists()

    def broken():
        with staged_folder(final) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert (final / "a").read_text() == "old"
    with staged_folder(final) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_staged_folder_recovers_what_an_ended_process_left(tmp_path):
    final, left = tmp_path / "final", tmp_path / ".incomplete"
    (left / "final").mkdir(parents=True)
    (left / "final" / "part").write_text("of an unfinished one")
    (left / "final.retired").mkdir()
    (left / "final.retired" / "a").write_text("whole")

    def broken():
        with staged_folder(final) as folder:
            assert not list(folder.iterdir())
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert (final / "a").read_text() == "whole"
    assert not left.exists()


def test_a_failed_rename_puts_the_former_folder_back(tmp_path, monkeypatch):
    final = tmp_path / "final"
    with staged_folder(final) as folder:
        (folder / "a").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if target == final and self.parent.name == ".incomplete" and "retired" not in self.name:
            raise OSError("rename failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)

    def replace():
        with staged_folder(final) as folder:
            (folder / "a").write_text("new")

    with pytest.raises(OSError, match="rename failed"):
        replace()
    assert (final / "a").read_text() == "old"


def test_state_comes_back_in_its_order(tmp_path):
    shared = torch.arange(3.0)
    tensors = {"b/z": shared, "a/y": torch.ones((), dtype=torch.int64), "b/a": shared}
    save_state(tmp_path, tensors, {"step": 3})
    loaded, values = load_state(tmp_path)
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert values == {"step": 3}
    assert load_state(tmp_path / "nowhere") is None


def test_recover_cleans_and_restores(tmp_path):
    recover(tmp_path)
    left = tmp_path / ".incomplete"
    for name in ("checkpoint-2", "checkpoint-2.retired", "checkpoint-3.retired"):
        (left / name).mkdir(parents=True)
        (left / name / "a").write_text(name)
    (tmp_path / "checkpoint-3").mkdir()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-2" / "a").read_text() == "checkpoint-2.retired"
    assert not list((tmp_path / "checkpoint-3").iterdir())
