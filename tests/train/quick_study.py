"""A study of runs in its quick setting, in this process, and what each of its runs began with."""

import io

import pytest
import torch
from rich.console import Console
from vcore_train.experiments import run
from vcore_train.experiments.study import StudyOptions, run_study


def watched_study(study, out):
    """The result of the module ``study``, and weights, first batch and seed of each run."""
    begun = []

    def train(start, rows, judged, arm, setting, **options):
        weights = torch.cat([p.detach().flatten() for p in start.model.parameters()])
        ids = [row["input_ids"] for row in run.drawn(rows, len(rows), options["seed"])[:4]]
        begun.append((weights, ids, options["seed"]))
        return run.train(start, rows, judged, arm, setting, **options)

    name = study.__name__.rpartition(".")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", train)
        patch.setattr(torch, "get_num_threads", lambda: 1)  # no processes
        record = run_study(name, StudyOptions(out, quick=True), Console(file=io.StringIO()))
    return record["result"], begun
