"""What any loop trains with: a model ready on its rank, with scorer, optimizer and schedule.

It knows no data, no run folder and no order of steps. It stands in this room and not in `engine`, because memory is
resolved by `planning` once adapters are attached and before the optimizer is made.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, ProjectConfiguration
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from qorpo.data.groups import Group, GroupLengths
from qorpo.engine.distributed import as_on_main, make_accelerator, ranks_of, reshard
from qorpo.engine.optim import make_optimizer, make_schedule
from qorpo.engine.step import run_step, score_groups, summed_logps
from qorpo.engine.within_memory import within_memory
from qorpo.errors import ModelError, RunError
from qorpo.model.adapters import b_matrices
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.liger import apply_liger, has_liger
from qorpo.model.load import keep_nf4_trainable
from qorpo.model.mixed_precision import casts_of
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import resolve_mode
from qorpo.objectives.base import Objective
from qorpo.planning.auto import cap_card, resolve_memory
from qorpo.recipe import Recipe
from qorpo.training.weights import make_weights

T = TypeVar("T")


class Session:
    """A model made ready to train as a recipe says.

    Args:
        model: a causal language model of transformers, or a PEFT model.
        recipe: resolved for the model's device (`resolve_on`).
        longest: the longest group that will be scored.
        total_steps: over which the learning rate's schedule goes.

    Attributes:
        recipe: with what `auto` of attention, liger and memory became; micro-batches may still become smaller.
        weights: what of the model trains; `trained` are its parameters.
        scorer: PackedGroups -> log-probs, as accelerate wrapped or sharded it; `unwrapped` is the Scorer inside.
        ranks: this process among the others.

    Raises:
        ModelError: where the model can't be scored exactly, or nothing in it trains.
        RunError: where so many ranks can't share a step, or the optimizer can't work on shards.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, recipe: Recipe, *, longest: GroupLengths, total_steps: int
    ):
        self.longest = longest
        self.dtype = model.dtype  # what it computes in
        self.compute_dtype = casts_of(recipe.tuning, self.dtype)
        self.accelerator = make_accelerator(
            recipe, model, self.compute_dtype,
            log_with=list(recipe.train.report_to) or None,
            project_config=ProjectConfiguration(recipe.output, logging_dir=str(Path(recipe.output) / "trackers")),
        )  # fmt: skip
        self.is_sharded = self.accelerator.distributed_type is DistributedType.FSDP
        check_ranks(recipe, self.accelerator.num_processes, self.is_sharded)

        keep_nf4_trainable(model)
        apply_liger(model, recipe.model.liger)
        self.weights = make_weights(model, recipe)
        self.model: Any = self.weights.model
        self.recipe = recipe
        scorer = Scorer(self.model)
        if not self.is_sharded:
            scorer.compute_dtype = self.compute_dtype
            self._resolve_attention(scorer, scorer)
        self._resolve_memory(scorer)

        optimizer = make_optimizer(trained_of(self.model), recipe.train, b_matrices(self.model))
        self.scorer, self.optimizer = self.accelerator.prepare(scorer, optimizer)
        self.trained = trained_of(scorer)
        if self.is_sharded:  # a forward needs every rank, and its weights only now are everywhere
            self._resolve_attention(scorer, self.scorer)
        self.ranks = ranks_of(self.accelerator, self.scorer)
        self.schedule = make_schedule(self.optimizer, recipe.train, total_steps)

    def _resolve_attention(self, scorer: Scorer, call: Callable[..., torch.Tensor]) -> None:
        """Find out how this model is attended, and whether liger's modules stay."""
        keys = self.recipe.model
        resolve_mode(scorer, call, keys.attention, self.compute_dtype, keys.liger)
        self.recipe = self.recipe.replace("model.attention", scorer.mode)
        self.recipe = self.recipe.replace("model.liger", has_liger(scorer.model))

    def _resolve_memory(self, scorer: Scorer) -> None:
        """Find out what fits, and make scorer and layers so."""
        device = self.accelerator.device
        # Ranks may find different amounts of memory free, and must take the same micro-batches.
        self.recipe = as_on_main(
            resolve_memory(
                self.recipe, self.model, self.longest,
                device=device, dtype=self.dtype, ranks=self.accelerator.num_processes,
            )
        )  # fmt: skip
        memory = self.recipe.memory
        cap_card(memory.budget_gib, device)
        scorer.chunk_tokens = int(memory.logprob_chunk_tokens)
        if layers := memory.activation_checkpointing:
            offload = memory.activation_offload is True
            checkpoint_layers(self.model, None if layers is True else int(layers), offload=offload)

    @property
    def unwrapped(self) -> Scorer:
        return self.accelerator.unwrap_model(self.scorer)

    def backward(self, groups: Sequence[Group], objective: Objective, seed: int) -> dict[str, torch.Tensor]:
        """Leave a step's gradient, clipped, in the parameters.

        Args:
            seed: of the step's dropout.

        Returns:
            The objective's means over the groups and `grad_norm`, before it was clipped: on the device, not waited for.
        """
        self.model.train()

        def attempt(microbatch_tokens: int) -> dict[str, torch.Tensor]:
            torch.manual_seed(seed)
            backward = self.accelerator.backward
            means = self._call(
                run_step, groups, objective, backward=backward, microbatch_tokens=microbatch_tokens
            )
            most = self.recipe.train.max_grad_norm or math.inf
            means["grad_norm"] = self.accelerator.clip_grad_norm_(self.trained, most)
            return means

        return self._within_memory(attempt, groups)

    def evaluate(self, groups: Sequence[Group], objective: Objective) -> dict[str, torch.Tensor]:
        """(P,) float64 on the host of each of the objective's metrics, in eval mode and without a gradient."""
        return self._score_only(score_groups, groups, objective)

    def summed_logps(self, groups: Sequence[Group]) -> torch.Tensor:
        """(P, N) float64 of each response, in the order of the groups, as `evaluate` scores: on the device of all ranks."""
        return self._score_only(summed_logps, groups)

    def _score_only(self, score: Callable[..., T], groups: Sequence[Group], *more: Any) -> T:
        self.model.eval()
        with torch.no_grad():
            found = self._within_memory(
                lambda microbatch_tokens: self._call(
                    score, groups, *more, microbatch_tokens=microbatch_tokens
                ),
                groups,
            )
        if self.is_sharded:
            reshard(self.scorer)
        return found

    def _call(self, score: Callable[..., T], *given: Any, **options: Any) -> T:
        """`run_step`, or what else of its room takes a scorer."""
        with self.unwrapped.packed_attention():
            return score(self.scorer, *given, device=self.accelerator.device, ranks=self.ranks, **options)

    def _within_memory(self, attempt: Callable[[int], T], groups: Sequence[Group]) -> T:
        """`attempt(microbatch_tokens)` on the groups, in smaller micro-batches from then on where memory runs out."""
        given = int(self.recipe.memory.microbatch_tokens)
        if self.ranks.count > 1:  # one rank can't redo a step without the others
            return attempt(given)
        found, took = within_memory(attempt, groups, given, undo=self.optimizer.zero_grad)
        if took != given:
            self.recipe = self.recipe.replace("memory.microbatch_tokens", took)
        return found


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train; raises ModelError where there are none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("nothing in the model trains; load its adapter with is_trainable=True")
    return trained


def check_ranks(recipe: Recipe, count: int, is_sharded: bool) -> None:
    """Raises RunError where `count` ranks can't share a step, or the optimizer can't work on shards."""
    if count > recipe.train.pairs_per_step:
        raise RunError(
            f"train.pairs_per_step: {recipe.train.pairs_per_step} pairs can't be shared by {count} processes; "
            "raise it, or start fewer"
        )
    if is_sharded and not recipe.train.optimizer.startswith("adamw_torch"):
        raise RunError(
            f"train.optimizer: {recipe.train.optimizer} can't work on sharded parameters; "
            "set it to auto or adamw_torch_fused"
        )
