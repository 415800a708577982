"""Training on sampled responses: RAFT, RAFT++ and GRPO with allocated samples."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from vcore_kernels import grpo_loss, raft_loss
from vcore_kernels.spans import span
from vcore_train.base_trainer import BaseTrainer
from vcore_train.checkpoint import load_state, save_state
from vcore_train.collators import PaddingCollator, model_inputs
from vcore_train.data import prompt_tokens
from vcore_train.gradient_norms import norm_parameters, sequence_grad_norms
from vcore_train.gvm.config import GvmConfig
from vcore_train.gvm.engines import NoEngine, RolloutEngine, Sampling, TransformersEngine
from vcore_train.gvm.evaluation import Evaluation, evaluate_prompts
from vcore_train.gvm.figures import e_step_figures, prompt_rows, warn
from vcore_train.gvm.m_step import MStep, TrainedRow, plan_m_step, trained_row
from vcore_train.gvm.run_file import alone_in, check_run, describe_run, keep_run
from vcore_train.gvm.sampling import Collector, EStep, Plan, Progress, Task, e_step, prompts_of
from vcore_train.gvm.store import (
    IterationStore,
    Rollout,
    fingerprint,
)
from vcore_train.head_check import verify_head
from vcore_train.metrics import Metrics
from vcore_train.modeling import (
    IGNORE_INDEX,
    causal_lm,
    head_of,
    probing,
    token_nll,
)
from vcore_train.prompts import as_prompts
from vcore_train.run_folder import ROLLOUTS
from vcore_train.sharding import within_forward
from vcore_train.verifiers import Verification, Verifier

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"


@dataclass
class _Iteration:
    """The iteration under way."""

    number: int
    tasks: list[Task]
    e_step: EStep
    m_step: MStep
    store: IterationStore
    figures: dict[str, float]
    logp: dict[str, list[Tensor]]  # "old", "ref": [n] of each row of the M-step, where needed


class GvmTrainer(BaseTrainer):
    """Trains a causal language model on its own responses, sampled where they teach most.

    Each iteration (see :class:`GvmConfig`): the first stage samples every prompt a few times with
    the current weights; the verifier gives each response a reward, accepted above 0; from the
    acceptance rate p and the gradient norm G of each prompt the rule distributes the samples of
    the second stage (GVM, arXiv 2505.02391); the M-step takes optimizer steps of RAFT, RAFT++ or
    GRPO on what came back, with respect to the log-probabilities before its first step. At that
    step ratios are exactly 1. Where the rule finds no prompt that it would give a sample to, the
    rest of the budget is shared evenly; where no response is left to learn from, the weights stay
    as they are for that iteration and a warning says so.

    Under ``output_dir/rollouts`` every response is on disk before the next batch is sampled, with
    p, G and the samples of each prompt and the figures of the iteration. After a kill at any moment
    ``train(resume_from_checkpoint=True)`` continues from the last checkpoint (or from the start
    where there is none), samples only what is missing, and repeats what an uninterrupted run would
    have done, bit for bit where the machine's arithmetic is reproducible. Responses of other
    weights than those that resumed (an earlier checkpoint, for instance) are set aside as
    ``*.replaced``.

    Logged at each optimizer step: ``loss``, and over the tokens that train ``ratio`` (mean),
    ``clip_fraction`` (those whose ratio the clip holds) and ``kl_old`` (k3 estimate of the KL from
    the policy that sampled, nats a token). Once an iteration: ``accept_rate`` (all responses),
    ``reward``, ``rollouts`` (all so far), ``trained_rows``, ``prompts_accepted`` /
    ``prompts_rejected`` / ``prompts_solved`` (with some, no, only accepted responses),
    ``truncated`` and ``truncated_accepted`` (cut at the length limit), ``unverified`` (verifier
    raised, hung or died), ``missing`` (not returned by the engine), ``fell_back``, ``empty_steps``
    (optimizer steps without a response), ``response_tokens`` (mean), ``samples_min`` /
    ``samples_max`` (of a prompt in the second stage), ``prompts_unsampled``, ``grad_norm_mean``,
    and seconds of each part.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        args: a :class:`GvmConfig`.
        train_dataset: prompts with reference answers: :class:`vcore_train.prompts.Prompt` objects,
            or rows (a list or ``datasets.Dataset``) with ``prompt`` (text or the turns of a
            conversation) and ``answer``.
        processing_class: the tokenizer.
        verifier: ``"exact"``, ``"math-verify"`` or a function (response, answer) -> reward, which
            runs in processes of its own (:mod:`vcore_train.verifiers`).
        engine: samples responses; None: :class:`TransformersEngine`.
        eval_dataset: more prompts, for the accuracy that ``evaluate`` gives.
        ref_model: reference of the KL where ``beta`` is not 0. None: the model as it was given
            (PEFT: without its adapters, otherwise a copy).
        **kwargs: as in ``transformers.Trainer``.

    Raises:
        TypeError, ValueError: a model, data set or combination of options that cannot be trained,
            with what would work.
    """

    args: GvmConfig

    def __init__(
        self,
        model: nn.Module | None = None,
        args: GvmConfig | None = None,
        *,
        train_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        verifier: str | Verifier = "math-verify",
        engine: RolloutEngine | None = None,
        eval_dataset: Any = None,
        ref_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        args = GvmConfig() if args is None else args
        if not isinstance(args, GvmConfig):
            raise TypeError(
                f"GvmTrainer: args must be a GvmConfig, got {type(args).__name__}. It takes every "
                "option of TrainingArguments."
            )
        if args.world_size > 1:
            raise ValueError(
                f"GvmTrainer: works in one process so far, and there are {args.world_size}."
            )
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError("GvmTrainer: processing_class must be the model's tokenizer.")
        super().__init__(
            model, args, eval_dataset=eval_dataset, processing_class=processing_class, **kwargs
        )
        self.tokenizer = processing_class
        unwrapped = self._unwrapped()
        verify_head(unwrapped)
        head_of(unwrapped).tempered(args.temperature)
        self.tasks = self._tasks(train_dataset, "training") if train_dataset is not None else []
        self._check_sizes()
        self.engine = TransformersEngine(processing_class) if engine is None else engine
        self.verification = Verification(
            verifier, seconds=args.verifier_seconds, workers=args.verifier_workers
        )
        self.progress: Progress = self._tqdm
        self.metrics = Metrics()
        self._vocabulary = causal_lm(unwrapped).config.get_text_config().vocab_size
        if args.allocation == "gvm":
            norm_parameters(unwrapped, args.norm_params)
        self._reference = self._make_reference(ref_model)
        self._policy: str | None = None  # that sampled the iteration under way
        self._verifier = verifier
        self._run: dict[str, Any] = {}
        self._collate = PaddingCollator(processing_class.pad_token_id or 0)
        self._iteration: _Iteration | None = None
        self._evaluated: tuple[Any, list[Task]] | None = None  # a data set and its prompts

    # ---- construction ----

    def _tasks(self, dataset: Any, what: str) -> list[Task]:
        """The prompts of a data set as tokens."""
        prompts = as_prompts(dataset, what)
        tokens = prompt_tokens([prompt.prompt for prompt in prompts], self.tokenizer)
        window = causal_lm(self._unwrapped()).config.get_text_config().max_position_embeddings
        for prompt, row in zip(prompts, tokens, strict=True):
            if not row:
                raise ValueError(f"{prompt.where}: the prompt has no token.")
            if window is not None and len(row) + self.args.max_new_tokens > window:
                raise ValueError(
                    f"{prompt.where}: the prompt has {len(row)} tokens, and with max_new_tokens="
                    f"{self.args.max_new_tokens} that is more than the model's window of {window}. "
                    "Lower max_new_tokens, or leave the prompt out."
                )
        return [
            Task(i, row, p.answer) for i, (row, p) in enumerate(zip(tokens, prompts, strict=True))
        ]

    def _check_sizes(self) -> None:
        wanted, number = self.args.prompts_per_iteration, len(self.tasks)
        if wanted is not None and 0 < number < wanted:
            raise ValueError(
                f"GvmTrainer: prompts_per_iteration={wanted}, but there are {number} prompts."
            )

    def _make_reference(self, given: nn.Module | None) -> nn.Module | None:
        """None where no KL is taken, or where a PEFT model without its adapters serves."""
        if self.args.beta == 0:
            return None
        if given is None and isinstance(self._unwrapped(), PeftModel):
            return None
        reference = copy.deepcopy(self._unwrapped()) if given is None else given
        verify_head(reference)
        return reference.to(self.args.device).requires_grad_(False).eval()

    # ---- the run ----

    def get_train_dataloader(self) -> DataLoader:
        """The optimizer steps by number; what each trains on is only known when it is reached."""
        if not self.tasks:
            raise ValueError("GvmTrainer: training needs a train_dataset.")
        steps = cast(Any, range(self.args.max_steps))
        return DataLoader(steps, batch_size=1, collate_fn=lambda numbers: {"number": numbers[0]})

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        folder = self._folder / ROLLOUTS
        if not resume_from_checkpoint and any(folder.glob("iteration-*")):
            raise ValueError(
                f"GvmTrainer: {folder} holds responses of an earlier run. Continue it with "
                "resume_from_checkpoint=True, or choose another output_dir."
            )
        if resume_from_checkpoint is True and get_last_checkpoint(str(self._folder)) is None:
            resume_from_checkpoint = None  # killed before the first one; its responses are here
        self._run = describe_run(self.args, self.tasks, self._verifier, self._reference)
        check_run(folder / RUN_FILE, self._run)
        self._iteration = None
        try:
            with alone_in(self._folder):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.verification.close()

    @property
    def _folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, None]:
        next(epoch_iterator)
        number = self.state.global_step
        iteration, place = divmod(number, self.args.steps_of_iteration)
        if self._iteration is None or self._iteration.number != iteration:
            self._iteration = None  # frees the last one
            self._iteration = self._begin(iteration, middle=place > 0)
        return [{"number": number, "micro_batches": self._iteration.m_step.steps[place]}], None

    def _begin(self, number: int, *, middle: bool) -> _Iteration:
        """The E-step, and the plan of the M-step. ``middle``: of an iteration that is resumed."""
        args, model = self.args, self._unwrapped()
        if not middle:
            self._policy = fingerprint(model)
        keep_run(self._folder / ROLLOUTS / RUN_FILE, self._run)
        folder = self._folder / ROLLOUTS / f"iteration-{number:04d}"
        store = IterationStore(folder, self._policy, reading=middle)
        if store.replaced:
            logger.warning(
                "The responses in %s were sampled by other weights and are set aside.", folder
            )
        taken = args.prompts_per_iteration or len(self.tasks)
        places = list(range(taken))
        if taken < len(self.tasks):
            places = prompts_of(number, len(self.tasks), taken, args.seed)
        tasks = [self.tasks[i] for i in places]
        start = time.perf_counter()
        with self.compute_loss_context_manager():
            self.engine.load(model)
            collector = Collector(
                NoEngine() if middle else self.engine,
                self.verification,
                self.tokenizer,
                args.sampling,
                store,
                tasks,
                vocabulary=self._vocabulary,
                batch_size=args.generation_batch_size,
                seed=(args.seed, number),
                progress=self.progress,
            )
            with span("e_step"):
                found = e_step(
                    collector,
                    Plan(
                        args.allocation,
                        cast(dict, args.allocation_options),
                        args.samples_per_prompt,
                        args.stage1,
                        args.reuse_stage1,
                        args.grad_norm_average,
                    ),
                    lambda rollouts: self._norms(tasks, rollouts, middle=middle),
                )
            figures = {
                "iteration": number,
                "rollouts": self._rollouts_before(number) + len(found.rollouts),
                **e_step_figures(found),
                "e_step_seconds": time.perf_counter() - start,
            }
            m_step = plan_m_step(found, tasks, args, iteration=number)
            with span("logp"):
                logp = self._logp_before(store, m_step, middle=middle)
        store.save_prompts(prompt_rows(tasks, found))
        if args.rollout_format == "parquet":
            store.to_parquet()
        warn(number, found, trained=len(m_step.rows))
        figures["trained_rows"] = len(m_step.rows)
        figures["empty_steps"] = sum(not step for step in m_step.steps)
        return _Iteration(number, tasks, found, m_step, store, figures, logp)

    def _norms(self, tasks: Sequence[Task], rollouts: Sequence[Rollout], *, middle: bool) -> Tensor:
        """Of the gradient of each response's summed log-probability."""
        if middle:
            raise self._moved_on("gradient norms")
        rows = [trained_row(tasks, rollout) for rollout in rollouts]
        norms = torch.zeros(len(rows), dtype=torch.float64)
        with self.progress("gradient norms", len(rows)) as advance:
            for places in self._by_length(rows):
                norms[places] = (
                    sequence_grad_norms(
                        self._unwrapped(),
                        self._batch([rows[i] for i in places]),
                        params=self.args.norm_params,
                        temperature=self.args.temperature,
                    )
                    .double()
                    .cpu()
                )
                advance(len(places))
        return norms

    def _by_length(self, rows: Sequence[TrainedRow]) -> Iterator[list[int]]:
        """Micro-batches of places in ``rows``."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
        size = self.args.per_device_train_batch_size
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _batch(self, rows: Sequence[TrainedRow]) -> dict[str, Tensor]:
        collated = self._collate([{"input_ids": r.input_ids, "labels": r.labels} for r in rows])
        return self._prepare_inputs(model_inputs(collated))

    # ---- log-probabilities ----

    def _logp(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, T], 0 where not supervised."""
        head = head_of(model).tempered(self.args.temperature)
        return -token_nll(model, inputs, head=head)

    def _logp_before(
        self, store: IterationStore, m_step: MStep, *, middle: bool
    ) -> dict[str, list[Tensor]]:
        """Of the policy that sampled and of the reference, for each row, before any step."""
        args, found, needed = self.args, {}, []
        if args.objective != "raft" and args.steps_of_iteration > 1:
            needed.append("old")
        if args.beta > 0:
            needed.append("ref")
        if not needed or not m_step.rows:
            return {}
        tokens = torch.tensor([t for row in m_step.rows for t in row.labels if t != IGNORE_INDEX])
        lengths = [sum(label != IGNORE_INDEX for label in row.labels) for row in m_step.rows]
        kept = store.logp()
        same = kept is not None and set(kept) == {"tokens", *needed}
        if kept is not None and same and torch.equal(kept["tokens"], tokens):
            return {name: list(kept[name].split(lengths)) for name in needed}
        if middle:
            raise self._moved_on("log-probabilities of the responses")
        for name in needed:
            found[name] = self._row_logp(m_step.rows, reference=name == "ref")
        packed = {name: torch.cat(values) for name, values in found.items()}
        store.save_logp({"tokens": tokens, **packed})
        return found

    @staticmethod
    def _moved_on(what: str) -> ValueError:
        return ValueError(
            f"GvmTrainer: the checkpoint is in the middle of an iteration without the {what} from "
            "before its first step, and its weights have moved on. Resume from the checkpoint at "
            "the start of the iteration."
        )

    def _row_logp(self, rows: Sequence[TrainedRow], *, reference: bool) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        what = "log-probabilities" + (" of the reference" if reference else "")
        policy = self._as_reference() if reference else nullcontext(self._unwrapped())
        with (
            policy as model,
            torch.no_grad(),
            probing(model, attention=None),
            self.progress(what, len(rows)) as advance,
        ):
            for places in self._by_length(rows):
                batch = self._batch([rows[i] for i in places])
                logp = self._logp(model, batch)
                mask = batch["labels"] != IGNORE_INDEX
                for i, values, own in zip(places, logp, mask, strict=True):
                    found[i] = values[own].cpu()
                advance(len(places))
        return found

    @contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        if self._reference is not None:
            yield self._reference
            return
        model = cast(PeftModel, self._unwrapped())
        with model.disable_adapter():
            yield model

    # ---- one optimizer step ----

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """All micro-batches of the step. Without any no gradient is made, and nothing moves."""
        assert self._iteration is not None
        model.train()
        start = time.perf_counter()
        first = inputs["number"] % self.args.steps_of_iteration == 0
        total = torch.zeros((), device=self.args.device)
        with span("training_pass"):
            for places in inputs["micro_batches"]:
                rows = [self._iteration.m_step.rows[i] for i in places]
                with self.compute_loss_context_manager():
                    loss = self._loss(model, rows, places, on_policy=first)
                self.accelerator.backward(loss)
                total += loss.detach()
        figures = self._iteration.figures
        figures["m_step_seconds"] = figures.get("m_step_seconds", 0.0) + time.perf_counter() - start
        return total

    def _loss(
        self, model: nn.Module, rows: list[TrainedRow], places: list[int], *, on_policy: bool
    ) -> Tensor:
        assert self._iteration is not None
        args, kept = self.args, self._iteration.logp
        unwrapped, batch = self._unwrapped(model), self._batch(rows)
        mask = batch["labels"] != IGNORE_INDEX
        logp = within_forward(model, unwrapped, lambda: self._logp(unwrapped, batch))

        def padded(name: str) -> Tensor:
            values = torch.cat([kept[name][i] for i in places]).to(logp)
            return torch.zeros_like(logp).masked_scatter(mask, values)

        old = None if args.objective == "raft" else logp.detach() if on_policy else padded("old")
        advantage = torch.tensor([row.advantage for row in rows], device=logp.device)
        common: dict[str, Any] = {
            "mask": mask,
            "prompt_weight": torch.tensor([row.weight for row in rows], device=logp.device),
            "aggregation": args.loss_aggregation,
            "max_length": args.max_new_tokens,
            "num_items": self._iteration.m_step.num_items,
        }
        if old is not None:
            common |= {"clip_low": args.clip_low, "clip_high": args.clip_high}
            self._count_ratios(logp.detach() - old, advantage, mask)
        if args.objective == "grpo":
            common |= {"beta": args.beta, "dual_clip": args.dual_clip}
            common["ref_logp"] = padded("ref") if args.beta > 0 else None
            loss = grpo_loss(logp, old, advantage, **common)
        else:
            loss = raft_loss(logp, old, advantage, **common)
        return args.steps_per_iteration * loss

    def _count_ratios(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> None:
        ratio, tokens = log_ratio.exp(), mask.sum()
        above = (ratio > 1 + self.args.clip_high) & (advantage > 0).unsqueeze(1)
        below = (ratio < 1 - self.args.clip_low) & (advantage < 0).unsqueeze(1)
        for name, values in (
            ("ratio", ratio),
            ("clip_fraction", above | below),
            ("kl_old", torch.expm1(log_ratio) - log_ratio),
        ):
            self.metrics.add_to_ratio(name, values.where(mask, 0).sum(), tokens)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Of the training passes: 6 for each parameter and token."""
        assert self._iteration is not None
        rows = self._iteration.m_step.rows
        tokens = sum(len(rows[i].input_ids) for micro in inputs["micro_batches"] for i in micro)
        return 6 * tokens * causal_lm(self._unwrapped()).num_parameters()

    # ---- what is told ----

    def _rollouts_before(self, number: int) -> int:
        """Responses of the iterations before, by what was logged of the last of them."""
        logged = [line for line in self.state.log_history if "rollouts" in line]
        return int(logged[-1]["rollouts"]) if number and logged else 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        current = self._iteration
        if current is not None and current.figures:
            done = self.state.global_step == (current.number + 1) * self.args.steps_of_iteration
            if done:
                figures, current.figures = current.figures, {}
                current.store.save_metrics(figures)
                due = self.control.should_log
                super().log({**figures})
                self.control.should_log = due
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.metrics.drain()}
        super().log(logs, start_time)

    @contextmanager
    def _tqdm(self, what: str, total: int) -> Iterator[Callable[[int], Any]]:
        with tqdm(total=total, desc=what, leave=False, disable=self.args.disable_tqdm) as bar:
            yield bar.update

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Samples responses to the evaluation prompts and verifies them.

        Returns ``eval_accuracy`` (share of responses with a positive reward), ``eval_reward``,
        ``eval_truncated`` (share cut at the length limit), ``eval_unverified`` and
        ``eval_runtime``. A dictionary of data sets has these for each, its name in between.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset, metric_key_prefix = self._named_evaluation(dataset), f"eval_{dataset}"
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise ValueError("GvmTrainer: evaluation needs an eval_dataset.")
        start = time.perf_counter()
        figures = self._evaluation(dataset).figures(metric_key_prefix)
        figures[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("GvmTrainer: prompts have no labels to predict. Use evaluate.")

    def _named_evaluation(self, name: str) -> Any:
        if not isinstance(self.eval_dataset, dict) or name not in self.eval_dataset:
            raise ValueError(f"GvmTrainer: there is no eval_dataset named {name!r}.")
        return self.eval_dataset[name]

    def _evaluation(self, dataset: Any) -> Evaluation:
        args = self.args
        if self._evaluated is None or self._evaluated[0] is not dataset:
            self._evaluated = (dataset, self._tasks(dataset, "evaluation"))
        greedy = Sampling(args.max_new_tokens, temperature=0.0)
        with self.compute_loss_context_manager():
            self.engine.load(self._unwrapped())
            return evaluate_prompts(
                self.engine,
                self.verification,
                self.tokenizer,
                self._evaluated[1],
                greedy if args.eval_samples == 1 else args.sampling,
                samples=args.eval_samples,
                vocabulary=self._vocabulary,
                batch_size=args.generation_batch_size,
                seed=args.seed,
                progress=self.progress,
            )

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {"policy": self._policy}
        save_state(Path(output_dir), {}, state, main_process=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        loaded = None if checkpoint is None else load_state(Path(checkpoint))
        self._policy = None if loaded is None else loaded[1].get("policy")
