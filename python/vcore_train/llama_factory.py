"""Token weights in LLaMA-Factory's supervised fine-tuning::

    python -m vcore_train.llama_factory train config.yaml [name=value ...]
    torchrun --nproc-per-node 2 -m vcore_train.llama_factory train config.yaml

The file is LLaMA-Factory's own, with ``stage: sft``. Besides, it takes every option of
:class:`vcore_train.VcoreOptions` as ``vcore_<option>``, ``use_vcore: false``, which leaves
LLaMA-Factory as it is, and the names of the released VCORE code:

========================= ==========================================================================
``vcore_temperature: T``  ``temperature=T`` and, as there, the probe's gradient clipped to norm 1
                          (``vcore_probe_max_norm`` says otherwise)
``vcore_epsilon``         step of ``vcore_utility_method: finite_difference`` or ``central``; the
                          default, a forward derivative, has none and ignores it
``vcore_pre_ga: k``       probe batches of k micro-batches a process
``vcore_anchor_steps: k`` every k-th step is weighted
========================= ==========================================================================

Of the released code's own choices the defaults here are other ones: ``vcore_utility_method:
finite_difference`` and ``vcore_variance_control: loss`` bring them back.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vcore_train.config import VcoreOptions, with_vcore_options
from vcore_train.mixin import VcoreMixin

logger = logging.getLogger("vcore_train")

OWNER = "vcore_train.llama_factory"
PREFIX, SWITCH = "vcore_", "use_vcore"
PRE_GA = "pre_ga"  # of the released code; every other name of it is an option here too
_OBJECTIVES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")
_MISSING = (
    f"{OWNER} needs LLaMA-Factory: pip install llamafactory==0.9.5, or an environment of "
    "examples/llama_factory/environment.sh."
)
_OTHER_TRAINERS = ("use_ray", "use_mca", "use_hyper_parallel")


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """LLaMA-Factory's arguments, and the options of ours; None where ``use_vcore`` is false.

    Options are those of :class:`VcoreOptions`, and ``pre_ga``.

    Raises:
        ValueError: a name that there is not, with the nearest; arguments of LLaMA-Factory that
            choose another objective or trainer; packing that keeps no boundaries of examples.
    """
    theirs = {n: v for n, v in arguments.items() if n != SWITCH and not n.startswith(PREFIX)}
    given = {n.removeprefix(PREFIX): v for n, v in arguments.items() if n.startswith(PREFIX)}
    known = [*(f.name for f in fields(VcoreOptions)), PRE_GA]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise ValueError(
                f"{OWNER}: unknown argument {PREFIX}{name}. The nearest is {PREFIX}{near}."
            )
    switch = arguments.get(SWITCH, True)
    if not isinstance(switch, bool):
        raise ValueError(f"{OWNER}: {SWITCH} must be true or false, got {switch!r}.")
    if not switch:
        return theirs, None
    options = {name: value for name, value in given.items() if value is not None}
    if given.get("variance_cap", 1.0) is None:
        options["variance_cap"] = None  # the one option for which null is not the default
    if "temperature" in options and "probe_max_norm" not in given:
        options["probe_max_norm"] = 1.0
    if options.get("utility_method", "jvp") == "jvp" and options.pop("epsilon", None) is not None:
        logger.warning(
            "vcore_epsilon is ignored: utilities are forward derivatives, which have no step "
            "(vcore_utility_method: finite_difference has)."
        )
    if PRE_GA in options and "probe_batch_size" in options:
        raise ValueError(
            f"{OWNER}: {PREFIX}{PRE_GA} and {PREFIX}probe_batch_size both say how large a probe "
            "batch is. Drop one."
        )
    _check_theirs(theirs, options)
    return theirs, options


def _check_theirs(theirs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    stage = theirs.get("stage", "sft")
    if stage != "sft":
        raise ValueError(
            f"{OWNER}: stage must be sft, got {stage!r}. Set {SWITCH}: false, or run "
            "llamafactory-cli."
        )
    for name in _OBJECTIVES:
        if theirs.get(name):
            mend = f"{PREFIX}method: dft" if name == "use_dft_loss" else f"{SWITCH}: false"
            raise ValueError(
                f"{OWNER}: {name} is another objective. Drop it, or set {mend} instead."
            )
    for name in _OTHER_TRAINERS:
        if theirs.get(name):
            raise ValueError(
                f"{OWNER}: {name} trains by another trainer. Drop it, or set {SWITCH}: false."
            )
    attention = str(theirs.get("flash_attn", "auto"))
    packed = theirs.get("packing") or theirs.get("neat_packing")
    apart = theirs.get("neat_packing") and attention == "fa2"
    if packed and not apart and options.get("method", "vcore") in ("vcore", "random"):
        raise ValueError(
            f"{OWNER}: packed rows of LLaMA-Factory keep their examples apart only with "
            "neat_packing: true and flash_attn: fa2; otherwise weights would be taken over a whole "
            "row. Set these two, or packing: false."
        )


def train(arguments: Mapping[str, Any], callbacks: list[Any] | None = None) -> None:
    """LLaMA-Factory's ``run_exp(arguments)`` with token weights; what it writes is unchanged.

    Raises ImportError without LLaMA-Factory, ValueError as :func:`split_arguments`, and what
    :class:`vcore_train.VcoreMixin` raises.
    """
    theirs, options = split_arguments(arguments)
    with _audio_stand_in():
        try:
            from llamafactory.train import tuner
        except ModuleNotFoundError as error:
            if error.name != "llamafactory":
                raise
            raise ImportError(_MISSING) from error
        from llamafactory.train.sft import workflow
    plain = workflow.CustomSeq2SeqTrainer
    if options is not None:
        workflow.CustomSeq2SeqTrainer = trainer_class(plain, options)
    try:
        tuner.run_exp(theirs, callbacks)
    finally:
        workflow.CustomSeq2SeqTrainer = plain


def trainer_class(plain: type, options: Mapping[str, Any]) -> type:
    """LLaMA-Factory's trainer ``plain``, weighing tokens as ``options`` say."""

    class VcoreSeq2SeqTrainer(VcoreMixin, plain):  # type: ignore[misc, valid-type]
        def __init__(self, *, args: Any, **kwargs: Any):
            own = dict(options)
            if PRE_GA in own:
                # Of one process there, of all of them here.
                size = args.per_device_train_batch_size * args.world_size
                own["probe_batch_size"] = own.pop(PRE_GA) * size
            super().__init__(args=with_vcore_options(args, **own), **kwargs)

    return VcoreSeq2SeqTrainer


@contextlib.contextmanager
def _audio_stand_in() -> Iterator[None]:
    """LLaMA-Factory imports torchaudio whatever the data are; text does without it."""
    name = "torchaudio"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return
    stand_in = types.ModuleType(name)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


def read_arguments(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Arguments in a YAML file, and ``name=value`` that go before them."""
    if Path(path).suffix not in (".yaml", ".yml"):
        raise ValueError(f"{OWNER}: expected a YAML file, got {str(path)!r}.")
    try:
        from omegaconf import OmegaConf  # comes with LLaMA-Factory
    except ModuleNotFoundError as error:
        raise ImportError(_MISSING) from error
    merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides))
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2 or argv[0] != "train":
        sys.exit(f"usage: python -m {OWNER} train config.yaml [name=value ...]")
    try:
        arguments = read_arguments(argv[1], argv[2:])
        split_arguments(arguments)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    train(arguments)


if __name__ == "__main__":
    main()
