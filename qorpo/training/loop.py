"""The training loop, top to bottom: pairs in, adapter and metrics out."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qorpo.build import build_objective, tokenized, with_adapter
from qorpo.card import write_run_card
from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group, TokenizedData
from qorpo.data.locate import Sources
from qorpo.data.records import Example
from qorpo.data.token_table import longest_group
from qorpo.engine.device import resolve_on
from qorpo.engine.distributed import from_main, runs_on
from qorpo.errors import Interrupted, RunError
from qorpo.identity import run_identity
from qorpo.model.load import read_chat_template
from qorpo.out_of_memory import advised
from qorpo.recipe import Recipe
from qorpo.reports.findings import change_for_the_worse
from qorpo.reports.pair_values import PairValues
from qorpo.reports.run_files import without_prefix
from qorpo.training.checkpoint import Checkpoints, TrainState
from qorpo.training.checks import check_early_stopping, check_positions, check_vocabulary
from qorpo.training.last_state import ending_with_advice
from qorpo.training.metrics import Metrics, speed_name, why_early
from qorpo.training.order import Order, mixed
from qorpo.training.progress import Progress
from qorpo.training.reference import Part, with_reference
from qorpo.training.resume import go_on
from qorpo.training.run_folder import RunFolder
from qorpo.training.saving import save_tokenizer
from qorpo.training.session import Session
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
        recipe = resolve_on(with_adapter(recipe), runs_on(recipe, model))
        self.objective = build_objective(recipe.objective)
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer, read_chat_template(recipe.model.chat_template))
        self.train_pairs = tokenized(train_pairs, self.chat, recipe)
        self.eval_pairs = [] if eval_pairs is None else list(tokenized(eval_pairs, self.chat, recipe))
        parts = [pairs for pairs in (self.train_pairs, self.eval_pairs) if pairs]
        for pairs in parts:
            check_vocabulary(model, tokenizer, pairs)
            check_positions(model, pairs)
        check_early_stopping(recipe, bool(self.eval_pairs))
        self.order = Order(len(self.train_pairs), recipe.train)

        self.session = Session(
            model, recipe, longest=max(map(longest_group, parts), key=sum), total_steps=self.order.total_steps
        )
        accelerator = self.session.accelerator
        self.folder = RunFolder(
            recipe.output, is_main=accelerator.is_main_process, wait=accelerator.wait_for_everyone
        )
        self.progress = progress or Progress()
        self.trackers = Trackers(accelerator, self.folder)
        self.metrics = Metrics(self.folder, self.progress, self.trackers.log, accelerator.device)
        self.scored: PairValues | None = None  # each held-out group's figures at the last evaluation
        self.state = TrainState()
        self.is_whole = True  # the weights are those of `state`: nothing was broken off while it changed them
        identity = from_main(lambda: run_identity(self.recipe, self.chat, train_pairs, eval_pairs))
        self.checkpoints = Checkpoints(self.folder, self.session, belongs_to=identity)

    @property
    def recipe(self) -> Recipe:
        """With what every `auto` became."""
        return self.session.recipe

    @property
    def model(self) -> Any:
        """The model that trains, with its adapters."""
        return self.session.model

    @property
    def result(self) -> Path:
        """Where the trained adapter goes, or the model of full tuning."""
        return self.folder.path / self.session.weights.name

    @property
    def total_steps(self) -> int:
        return self.order.total_steps

    def groups_of_step(self, step: int) -> list[Group]:
        """The groups of a step, from 0."""
        return [self.train_pairs[place] for place in self.order.of_step(step)]

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
        if not resume and (folder.metrics.exists() or folder.checkpoints.exists()):
            raise RunError(f"output: {folder.path} holds a run; resume it, or give another output")
        folder.wait()  # until all have looked
        with folder.writing():
            folder.path.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(self.progress), contextlib.ExitStack() as stack:
            if self.objective.needs_reference:
                self._take_reference()
            if resume:
                self.state = go_on(self.session, self.checkpoints, self.metrics, self.total_steps)
            stack.enter_context(self.trackers.open(self.recipe.to_dict()))
            stack.enter_context(ending_with_advice(self))
            self.progress.start(self.state.step, self.total_steps)
            with StopSignals() as signals:
                self._before_the_first_step()
                while not self.is_done:
                    self._step()
                    self.progress.step(self.state.step)
                    waited = self._write_what_is_due()
                    # Of a run that is done, what is left is to save the result.
                    if not self.is_done and (received := signals.agreed(self.session.ranks, waited)):
                        self._stop(received)
            self._finish()
        evaluations = self.metrics.evaluations
        return evaluations[max(evaluations)] if evaluations else self.metrics.last_step

    def evaluate(self) -> dict[str, float]:
        """The objective's metrics over the evaluation pairs, each under `eval_` and its name.

        Raises:
            RunError: where there are no evaluation pairs, or the objective needs a reference and `train` was not called.
        """
        if not self.eval_pairs:
            raise RunError("no evaluation pairs; set data.eval, or give Trainer eval_pairs")
        if self.objective.needs_reference and not self.eval_pairs[0].reference_logps:
            raise RunError(f"{self.objective.name} needs the reference, which is scored as `train` begins")
        started = time.perf_counter()
        with self._noting_the_recipe():
            found = self.session.evaluate(self.eval_pairs, self.objective)
        self.scored = PairValues.of(self.eval_pairs, {name: each.tolist() for name, each in found.items()})
        metrics = {f"eval_{name}": each.mean().item() for name, each in found.items()}
        seconds = time.perf_counter() - started
        return metrics | {f"eval_{speed_name(self.eval_pairs)}": len(self.eval_pairs) / seconds}

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format (the model in transformers' after full tuning), the tokenizer with its
        chat template, and the tokens to stop at. All ranks together, of which the main one writes."""
        is_main = self.session.accelerator.is_main_process
        if is_main:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.session.weights.save(Path(folder), is_main)
        if is_main:
            save_tokenizer(Path(folder), self.chat)

    @property
    def is_done(self) -> bool:
        return self.state.step == self.total_steps or self.stopped_early is not None

    @property
    def stopped_early(self) -> str | None:
        """Why the run ends before its last step, by `train.early_stopping`; None where it does not."""
        state, patience, metric = self.state, self.recipe.train.early_stopping, self.objective.headline.metric
        evaluations = self.metrics.evaluations
        return why_early(evaluations, state.best_step, state.step, self.total_steps, patience, metric)

    @property
    def warning(self) -> str | None:
        """What to say where training left the held-out loss no lower than it was."""
        found = {step: without_prefix(row) for step, row in self.metrics.evaluations.items()}
        return change_for_the_worse(found, self.state.best_step, self.objective.headline)

    # --- the parts of the run ---

    def _take_reference(self) -> None:
        """Have the groups with the reference's log-probs; before a checkpoint is loaded, while the model is the start."""
        # As the first epoch's steps and an evaluation will have them, so that a policy that is the reference has its bits.
        steps = [self.order.of_step(step) for step in range(self.order.steps_per_epoch)]
        parts = {"train": Part(self.train_pairs, steps)}
        if self.eval_pairs:
            parts["eval"] = Part(self.eval_pairs, [range(len(self.eval_pairs))])
        advice = "nothing of the run was changed; free some memory, or lower memory's keys, and resume"
        with advised(advice), self._noting_the_recipe():
            found = with_reference(
                parts, self.session.summed_logps, self.folder, self.checkpoints.belongs_to,
                mismatched_by=self.recipe.train.seed if self.objective.needs_kl else None,
                on_progress=self.progress.scored,
            )  # fmt: skip
        self.train_pairs, self.eval_pairs = found["train"], list(found.get("eval", []))

    def _before_the_first_step(self) -> None:
        """Evaluate where the run stands, if that is due and was not done: the start takes part in what is best, and after
        a resume so does a step that ended before it was scored."""
        step = self.state.step
        is_due = bool(self.eval_pairs) and self.order.is_due(self.recipe.train.eval_every, step)
        if is_due and step not in self.metrics.evaluations:
            self._evaluate_and_write()
            self.checkpoints.write(self.state)

    def _step(self) -> None:
        """One optimizer step; its metrics stay on the device until the next flush."""
        session, started = self.session, time.perf_counter()
        groups = self.groups_of_step(self.state.step)
        # Every step draws its dropout from the seed and its own number: a resumed run needs no random state.
        seed = mixed(self.recipe.train.seed, self.state.step + 1)
        with self._noting_the_recipe():
            means = session.backward(groups, self.objective, seed)
        learning_rate = session.schedule.get_last_lr()[0]
        with self._changing_weights():
            session.optimizer.step()
            session.schedule.step()
            self.state.step += 1
        session.optimizer.zero_grad()
        figures = {**means, "learning_rate": learning_rate}
        self.metrics.add_step(groups, figures, time.perf_counter() - started)

    def _write_what_is_due(self) -> bool:
        """Log, evaluate and save where this step is one to do so after; returns whether it waited for the device."""
        settings, step = self.recipe.train, self.state.step
        is_evaluation = bool(self.eval_pairs) and self.order.is_due(settings.eval_every, step)
        is_save = self.order.is_due(settings.save_every, step)
        is_flush = is_evaluation or is_save or step % settings.log_every == 0
        if is_flush:
            self.flush_metrics()
            self.checkpoints.finish(wait=False)
        is_best = is_evaluation and self._evaluate_and_write()
        if is_save or is_best or (is_evaluation and self.is_done):
            self.checkpoints.write(self.state)
        return is_flush

    def flush_metrics(self) -> None:
        """Write the steps since the last flush, a line each."""
        self.metrics.write_steps(self.state.step, self.order.steps_per_epoch)

    def _evaluate_and_write(self) -> bool:
        """Returns whether this evaluation is the best so far."""
        step, metrics, headline = self.state.step, self.evaluate(), self.objective.headline
        if self.scored is not None:
            self.folder.write_held_out(step, self.scored, kept=(0, self.state.best_step))
        self.metrics.write_evaluation(step, metrics)
        value = metrics[f"eval_{headline.metric}"]
        is_best = headline.is_better(value, self.state.best_headline)
        if is_best:
            self.state.best_step, self.state.best_headline = step, value
        return is_best

    def _stop(self, received: signal.Signals) -> None:
        """Raises Interrupted, with a checkpoint of this step behind it."""
        self.flush_metrics()
        self.checkpoints.finish()
        step, folder = self.state.step, self.folder
        if step not in folder.checkpoint_steps():
            self.checkpoints.write(self.state)
            self.checkpoints.finish()
        raise Interrupted(
            f"stopped by {received.name} after step {step} of {self.total_steps}; {folder.way_on()}", received
        )

    def _finish(self) -> None:
        """Leave the result in its folder: the best weights, else the last."""
        self.checkpoints.finish()
        if reason := self.stopped_early:
            logger.info("%s", reason)
        if warning := self.warning:
            logger.warning("%s", warning)
        if self.state.best_step not in (None, self.state.step):
            with self._changing_weights():
                self.checkpoints.load_best(self.state)
        with self.folder.new_folder(self.result) as unfinished:
            self.save(unfinished)
            if self.folder.is_main:
                write_run_card(unfinished, self.folder.path, self.recipe)
            self.checkpoints.seal(unfinished)

    @contextlib.contextmanager
    def _changing_weights(self) -> Iterator[None]:
        """What is broken off in the midst of it can't be done again, nor saved."""
        self.is_whole = False
        yield
        self.is_whole = True

    @contextlib.contextmanager
    def _noting_the_recipe(self) -> Iterator[None]:
        """Where micro-batches had to become smaller in it, a resumed run begins with these."""
        given = self.recipe
        yield
        if self.recipe is not given and self.folder.recipe.exists():
            self.folder.write_recipe(self.recipe.to_yaml())
