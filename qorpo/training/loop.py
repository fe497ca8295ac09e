"""The training loop, top to bottom: pairs in, adapter and metrics out."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, ProjectConfiguration
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qorpo.build import build_objective, tokenized
from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group, GroupLengths, TokenizedData
from qorpo.data.locate import Sources
from qorpo.data.records import Example
from qorpo.data.token_table import longest_group
from qorpo.engine.device import resolve_on
from qorpo.engine.distributed import as_on_main, from_main, make_accelerator, ranks_of, reshard, runs_on
from qorpo.engine.optim import make_optimizer, make_schedule, take_rate
from qorpo.engine.step import run_step
from qorpo.engine.within_memory import within_memory
from qorpo.errors import Interrupted, ModelError, RunError
from qorpo.identity import run_identity
from qorpo.model.adapters import attach_lora
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.liger import apply_liger, has_liger
from qorpo.model.load import keep_nf4_trainable, read_chat_template
from qorpo.model.mixed_precision import casts_of, train_all
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import resolve_mode
from qorpo.out_of_memory import advised
from qorpo.planning.auto import cap_card, resolve_memory
from qorpo.recipe import Recipe
from qorpo.training.checkpoint import Checkpoints, TrainState
from qorpo.training.checks import check_positions, check_vocabulary
from qorpo.training.last_state import ending_with_advice
from qorpo.training.metrics import Metrics, change_for_the_worse
from qorpo.training.progress import Progress
from qorpo.training.run_folder import RunFolder
from qorpo.training.saving import save_adapter, save_tokenizer, save_whole_model
from qorpo.training.signals import StopSignals
from qorpo.training.trackers import Trackers

logger = logging.getLogger(__name__)


class Trainer:
    """An objective on pairs or demonstrations, one step after another.

    Args:
        model: a causal language model of transformers, quantized or not. LoRA is attached as the recipe says, unless
            it is a PEFT model already.
        tokenizer: its tokenizer; the recipe's chat template is set on it.
        recipe: what to do; every `auto` is resolved for the model's device.
        train_pairs: what to learn from: what `load_pairs` or `tokenize_pairs` gives, or all that `load_pairs` takes.
        eval_pairs: held-out pairs, or None.
        progress: told how it goes; silent by default.

    Raises:
        DataError: where no pair is left to train on. ModelError: where the model can't be scored exactly.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        train_pairs: Sequence[Example] | TokenizedData | Sources,
        eval_pairs: Sequence[Example] | TokenizedData | Sources | None = None,
        *,
        progress: Progress | None = None,
    ):
        recipe = resolve_on(recipe, runs_on(recipe, model))
        self.is_full = recipe.tuning == "full"
        self.objective = build_objective(recipe.objective)
        self.tokenizer = tokenizer
        self.progress = progress or Progress()

        self.chat = ChatFormat(tokenizer, read_chat_template(recipe.model.chat_template))
        self.train_pairs = tokenized(train_pairs, self.chat, recipe)
        self.eval_pairs = [] if eval_pairs is None else list(tokenized(eval_pairs, self.chat, recipe))
        for pairs in (self.train_pairs, self.eval_pairs):
            check_vocabulary(model, tokenizer, pairs)
            check_positions(model, pairs)

        self.dtype = train_all(model) if self.is_full else model.dtype
        casts_to = casts_of(recipe.tuning, self.dtype)
        self.accelerator = make_accelerator(
            recipe, model, casts_to,
            log_with=list(recipe.train.report_to) or None,
            project_config=ProjectConfiguration(recipe.output, logging_dir=str(Path(recipe.output) / "trackers")),
        )  # fmt: skip
        self.is_sharded = self.accelerator.distributed_type is DistributedType.FSDP
        self._check_ranks(recipe)
        self.folder = RunFolder(
            recipe.output,
            is_main=self.accelerator.is_main_process,
            wait=self.accelerator.wait_for_everyone,
        )
        self.trackers = Trackers(self.accelerator, self.folder)
        keep_nf4_trainable(model)
        apply_liger(model, recipe.model.liger)
        torch.manual_seed(recipe.train.seed)  # the adapters' first values
        lora = recipe.lora
        self.model: Any = model if self.is_full or isinstance(model, PeftModel) else attach_lora(
            model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout,
            targets=lora.targets, modules_to_save=lora.modules_to_save,
        )  # fmt: skip
        scorer = Scorer(self.model)
        if not self.is_sharded:
            scorer.compute_dtype = casts_to
            recipe = self._resolve_model(recipe, scorer, scorer, casts_to)
        # Ranks may find different amounts of memory free, and must take the same micro-batches.
        recipe = as_on_main(
            resolve_memory(
                recipe, self.model, self.longest_group,
                device=self.accelerator.device, dtype=self.dtype, ranks=self.accelerator.num_processes,
            )
        )  # fmt: skip
        cap_card(recipe.memory.budget_gib, self.accelerator.device)
        memory = recipe.memory
        scorer.chunk_tokens = int(memory.logprob_chunk_tokens)
        if layers := memory.activation_checkpointing:
            offload = memory.activation_offload is True
            checkpoint_layers(self.model, None if layers is True else int(layers), offload=offload)

        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ModelError("nothing in the model trains; load its adapter with is_trainable=True")
        self.scorer, self.optimizer = self.accelerator.prepare(
            scorer, make_optimizer(self.trained, recipe.train)
        )
        self.trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
        if self.is_sharded:  # a forward needs every rank, and its weights only now are everywhere
            recipe = self._resolve_model(recipe, scorer, self.scorer, casts_to)
        self.recipe = recipe
        self.ranks = ranks_of(self.accelerator, self.scorer)
        self.schedule = make_schedule(self.optimizer, recipe.train, self.total_steps)
        self.state = TrainState()
        self.is_whole = True  # the weights are those of `state`: nothing was broken off while it changed them
        self.metrics = Metrics(self.folder, self.progress, self.trackers.log, self.accelerator.device)
        self.checkpoints = Checkpoints(
            self.folder, self.model, self.scorer, self.optimizer.optimizer, self.schedule, self.ranks,
            is_full=self.is_full, keep=recipe.train.keep_checkpoints,
            belongs_to=from_main(lambda: run_identity(recipe, self.chat, train_pairs, eval_pairs)),
        )  # fmt: skip

    @staticmethod
    def _resolve_model(
        recipe: Recipe, scorer: Scorer, call: Callable[..., torch.Tensor], dtype: torch.dtype | None
    ) -> Recipe:
        """The recipe with what `auto` of attention and liger became for this model."""
        resolve_mode(scorer, call, recipe.model.attention, dtype, recipe.model.liger)
        recipe = recipe.replace("model.attention", scorer.mode)
        return recipe.replace("model.liger", has_liger(scorer.model))

    def _check_ranks(self, recipe: Recipe) -> None:
        ranks = self.accelerator.num_processes
        if ranks > recipe.train.pairs_per_step:
            raise RunError(
                f"train.pairs_per_step: {recipe.train.pairs_per_step} pairs can't be shared by {ranks} processes; "
                "raise it, or start fewer"
            )
        if self.is_sharded and not recipe.train.optimizer.startswith("adamw_torch"):
            raise RunError(
                f"train.optimizer: {recipe.train.optimizer} can't work on sharded parameters; "
                "set it to auto or adamw_torch_fused"
            )

    # --- the run's shape ---

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_pairs) / self.recipe.train.pairs_per_step)

    @property
    def total_steps(self) -> int:
        return self.recipe.train.max_steps or max(1, round(self.recipe.train.epochs * self.steps_per_epoch))

    def groups_of_step(self, step: int) -> list[Group]:
        """The pairs of a step, from 0: an order of its own for every epoch, which the seed alone decides."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mixed(self.recipe.train.seed, epoch))
        order = torch.randperm(len(self.train_pairs), generator=generator).tolist()
        size = self.recipe.train.pairs_per_step
        return [self.train_pairs[index] for index in order[place * size : (place + 1) * size]]

    def _due(self, every: float, step: int) -> bool:
        interval = every if every >= 1 else max(1, round(every * self.steps_per_epoch))
        return step % interval == 0 or step == self.total_steps

    # --- the run ---

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Train to the end, writing metrics and checkpoints into the run folder, and the adapter last.

        With evaluation pairs the adapter, in the folder and in memory, is the one with the best evaluation, by the
        objective's headline (its loss). The start takes part: where training only made the model worse, it is kept.

        Returns:
            The last evaluation's metrics (`eval_…`), else the last step's.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, with a checkpoint of the last step.
            QorpoError: where the folder is in the way or another process's, a checkpoint doesn't fit or is damaged, the
                disk is full, or the loss is no longer finite.
        """
        with self.folder.owned():
            return self._train(resume)

    def _train(self, resume: bool) -> dict[str, float]:
        folder = self.folder
        if resume:
            self._go_on()
        elif folder.metrics.exists() or folder.checkpoints.exists():
            raise RunError(f"output: {folder.path} holds a run; resume it, or give another output")
        folder.wait()  # until all have looked
        with folder.writing():
            folder.path.mkdir(parents=True, exist_ok=True)
        trackers = self.trackers.open(self.recipe.to_dict())
        with trackers, contextlib.closing(self.progress), ending_with_advice(self):
            self.progress.start(self.state.step, self.total_steps)
            with StopSignals() as signals:
                step = self.state.step
                is_due = bool(self.eval_pairs) and self._due(self.recipe.train.eval_every, step)
                if is_due and step not in self.metrics.evaluations:
                    # The start takes part in what is best; after a resume, so does a step that ended before it was scored.
                    self._evaluate_and_write()
                    self.checkpoints.write(self.state)
                while self.state.step < self.total_steps:
                    self._step()
                    self.progress.step(self.state.step)
                    waited = self._write_what_is_due()
                    if self._is_to_stop(signals.received, waited):
                        self._stop(signals.received)
            self.checkpoints.finish()
            if warning := self.warning:
                logger.warning("%s", warning)
            if self.state.best_step not in (None, self.state.step):
                with self._changing_weights():
                    self.checkpoints.load_best(self.state)
            with folder.new_folder(folder.model if self.is_full else folder.adapter) as unfinished:
                self.save(unfinished)
                self.checkpoints.seal(unfinished)
        evaluations = self.metrics.evaluations
        return evaluations[max(evaluations)] if evaluations else self.metrics.last_step

    def evaluate(self) -> dict[str, float]:
        """The objective's metrics over the evaluation pairs, each under `eval_` and its name.

        Raises:
            RunError: where there are no evaluation pairs.
        """
        if not self.eval_pairs:
            raise RunError("no evaluation pairs; set data.eval, or give Trainer eval_pairs")
        started = time.perf_counter()
        self.model.eval()
        with torch.no_grad():
            means = self._within_memory(self.eval_pairs)
        if self.is_sharded:
            reshard(self.scorer)
        metrics = {f"eval_{name}": value.item() for name, value in means.items()}
        seconds = time.perf_counter() - started
        return metrics | {"eval_pairs_per_second": len(self.eval_pairs) / seconds}

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format (the model in transformers' after full tuning), the tokenizer with its
        chat template, and the tokens to stop at. All ranks together, of which the main one writes."""
        is_main = self.accelerator.is_main_process
        if is_main:
            Path(folder).mkdir(parents=True, exist_ok=True)
        if self.is_full:
            save_whole_model(Path(folder), self.model, self.dtype, is_main)
        else:
            save_adapter(Path(folder), self.model, is_main)
        if is_main:
            save_tokenizer(Path(folder), self.chat)

    @property
    def warning(self) -> str | None:
        """What to say where training left the held-out loss no lower than it was."""
        return change_for_the_worse(self.metrics.evaluations, self.state.best_step, self.objective.headline)

    # --- the parts of the run ---

    def _go_on(self) -> None:
        """Stand where the last checkpoint does; with more steps than before the run goes on to a new end."""
        folder, settings = self.folder, self.recipe.train
        with advised(
            "nothing of the run was changed; free some memory, or lower memory's keys, and resume again"
        ):
            found = self.checkpoints.load_latest()
        if found is None:
            self.metrics.read_back(-1)
            logger.info("no checkpoint was written yet: starting at step 1")
            return
        self.state, planned = found, self.schedule.get_last_lr()[0]
        done, total = self.state.step, self.total_steps
        key = "epochs" if settings.max_steps is None else "max_steps"
        if done > total:
            raise RunError(
                f"train.{key}: {getattr(settings, key):g} is {total} steps, and {folder.path} has done {done}; give more, "
                "or another output"
            )
        self.metrics.read_back(done)
        take_rate(self.schedule)
        rate = self.schedule.get_last_lr()[0]
        if done == total:
            logger.info("nothing left to do: all %d steps are done; to go on, raise train.%s", total, key)
        elif rate != planned:
            logger.info(
                "%d steps now, %s: the learning rate of step %d was to be %.3g and is %.3g",
                total, settings.schedule, done + 1, planned, rate,
            )  # fmt: skip
            if folder.recipe.exists():
                folder.write_recipe(self.recipe.to_yaml())

    def _write_what_is_due(self) -> bool:
        """Log, evaluate and save where this step is one to do so after; returns whether it waited for the device."""
        settings, step = self.recipe.train, self.state.step
        is_evaluation = bool(self.eval_pairs) and self._due(settings.eval_every, step)
        is_save = self._due(settings.save_every, step)
        is_flush = is_evaluation or is_save or step % settings.log_every == 0
        if is_flush:
            self.flush_metrics()
            self.checkpoints.finish(wait=False)
        is_best = is_evaluation and self._evaluate_and_write()
        if is_save or is_best:
            self.checkpoints.write(self.state)
        return is_flush

    def _is_to_stop(self, received: signal.Signals | None, waited: bool) -> bool:
        """Whether a signal came, to any rank; several agree only where they wait for the device anyway."""
        if self.state.step == self.total_steps:
            return False  # what is left is to save the result
        if self.ranks.count == 1:
            return received is not None
        return waited and not self.ranks.all_are(received is None)

    def _stop(self, received: signal.Signals | None) -> None:
        """Raises Interrupted, with a checkpoint of this step behind it."""
        received = received or signal.SIGTERM  # another rank's
        self.flush_metrics()
        self.checkpoints.finish()
        step, folder = self.state.step, self.folder
        if step not in folder.checkpoint_steps():
            self.checkpoints.write(self.state)
            self.checkpoints.finish()
        raise Interrupted(
            f"stopped by {received.name} after step {step} of {self.total_steps}; {folder.way_on()}", received
        )

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.scorer)

    @property
    def longest_group(self) -> GroupLengths:
        longest = [longest_group(pairs) for pairs in (self.train_pairs, self.eval_pairs) if pairs]
        return max(longest, key=sum)

    def _within_memory(
        self,
        pairs: Sequence[Group],
        backward: Callable[[torch.Tensor], None] | None = None,
        seed: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """`run_step` on the pairs, in smaller micro-batches from then on where memory runs out.

        With `backward` gradients are clipped as well, and their norm is one of the means.
        """

        def attempt(microbatch_tokens: int) -> dict[str, torch.Tensor]:
            if seed is not None:
                torch.manual_seed(seed)
            with self._unwrapped.packed_attention():
                means = run_step(
                    self.scorer, pairs, self.objective, backward=backward,
                    microbatch_tokens=microbatch_tokens, device=self.accelerator.device, ranks=self.ranks,
                )  # fmt: skip
            if backward is not None:
                most = self.recipe.train.max_grad_norm or math.inf
                means["grad_norm"] = self.accelerator.clip_grad_norm_(self.trained, most)
            return means

        given = int(self.recipe.memory.microbatch_tokens)
        if self.ranks.count > 1:  # one rank can't redo a step without the others
            return attempt(given)
        means, took = within_memory(attempt, pairs, given, undo=self.optimizer.zero_grad)
        if took != given:
            self.recipe = self.recipe.replace("memory.microbatch_tokens", took)
            if self.folder.recipe.exists():
                self.folder.write_recipe(self.recipe.to_yaml())
        return means

    def _step(self) -> None:
        """One optimizer step; its metrics stay on the device until the next flush."""
        settings = self.recipe.train
        started = time.perf_counter()
        pairs = self.groups_of_step(self.state.step)
        self.model.train()
        # Every step draws its dropout from the seed and its own number: a resumed run needs no random state.
        seed = _mixed(settings.seed, self.state.step + 1)
        means = self._within_memory(pairs, self.accelerator.backward, seed)
        learning_rate = self.schedule.get_last_lr()[0]
        with self._changing_weights():
            self.optimizer.step()
            self.schedule.step()
            self.state.step += 1
        self.optimizer.zero_grad()
        figures = {**means, "learning_rate": learning_rate}
        self.metrics.add_step(pairs, figures, time.perf_counter() - started)

    @contextlib.contextmanager
    def _changing_weights(self) -> Iterator[None]:
        """What is broken off in the midst of it can't be done again, nor saved."""
        self.is_whole = False
        yield
        self.is_whole = True

    def flush_metrics(self) -> None:
        """Write the steps since the last flush, a line each."""
        self.metrics.write_steps(self.state.step, self.steps_per_epoch)

    def _evaluate_and_write(self) -> bool:
        """Returns whether this evaluation is the best so far."""
        step, metrics, headline = self.state.step, self.evaluate(), self.objective.headline
        self.metrics.write_evaluation(step, metrics)
        value = metrics[f"eval_{headline.metric}"]
        is_best = headline.is_better(value, self.state.best_headline)
        if is_best:
            self.state.best_step, self.state.best_headline = step, value
        return is_best


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each number, far apart from the neighbours'."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % 2**63
