import json

import pytest
from vcore_train.run_log import MetricsFile, read_metrics


def lines(*steps):
    return "".join(f"{json.dumps({'step': step})}\n" for step in steps)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "lo\n', "\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2) + torn)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    file = MetricsFile(path, keep_up_to=2)
    file.append({"step": 3})
    file.append({"step": 4})
    assert path.read_text() == lines(1, 2, 3, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", ['{"step": 2, "lo', "[1]"])
def test_a_bad_line_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{lines(1)}{bad}\n{lines(3)}")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        MetricsFile(path, keep_up_to=3)
    assert path.read_text() == f"{lines(1)}{bad}\n{lines(3)}"


def test_a_line_without_a_step_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 2.0}\n{"step": null}\n')
    with pytest.raises(ValueError, match="no number as its step"):
        MetricsFile(path, keep_up_to=3)


def test_the_file_is_touched_by_the_first_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert not path.exists()
    path.write_text(lines(7))
    file.append({"step": 1, "loss": float("nan")})
    assert read_metrics(path) == [{"step": 1, "loss": None}]
