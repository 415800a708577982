"""The studies behind the library's claims: ``vcore experiment NAME``.

A study is one module here and one line in ``STUDIES``. It has two settings, ``FULL`` and ``QUICK``
(seconds, for tests), and three functions:

* ``measure(context) -> dict``: plain data for JSON, with a :class:`~.setting.Context` that gives
  the trained models, the data and the progress bars;
* ``tables(result) -> list[Table]``: what of it a reader looks at (:mod:`~.report`);
* ``plot(result, path)``: the same at a glance, as PNG;

and, where it has them, ``records(result) -> list[dict]``, the rows of a CSV file, and
``reading(result) -> list[str]``, sentences on what came out, every one with its figure.

A study on other data than the shared rows says so in ``DATA``.
"""

STUDIES = {  # module in this package: what it answers, one line
    "fidelity": "How close does each estimator of the utilities come to float64?",
    "population": "How well do affordable directions stand for the population's?",
    "corruption": "Do token weights tell corrupted supervision from clean?",
    "descent": "What does one step gain from the weights, with which direction and budget?",
    "run": "Does a whole run of weighted training end below plain supervision?",
    "temperature": "Which temperatures are stable, and does one mean the same elsewhere?",
    "variance": "What does variance control do to gradients, spikes and the loss of a run?",
    "methods": "Which supervision is best, in and out of its domain, at equal steps and time?",
    "supervised_size": "How many examples does it take, and does weighting change it?",
    "probe_size": "How large a probe batch pays?",
    "cost": "What does a step cost in time and memory, in units of plain supervision?",
    "gvm": "Does it pay to decide how many responses each prompt gets, at equal cost?",
    "initialisation": "Which supervision is the best start for reinforcement learning?",
}
