"""Which groups each optimizer step takes, how many steps there are, and after which of them something is due."""

import math

import torch

from qorpo.recipe import TrainRecipe


class Order:
    """An order of its own for every epoch, which the seed alone decides: a resumed run needs no state of it.

    Args:
        num_groups: to train on.
        keys: of a resolved recipe.
    """

    def __init__(self, num_groups: int, keys: TrainRecipe):
        self.num_groups, self.seed, self.per_step = num_groups, keys.seed, keys.pairs_per_step
        self.steps_per_epoch = math.ceil(num_groups / self.per_step)
        self.total_steps = keys.max_steps or max(1, round(float(keys.epochs) * self.steps_per_epoch))
        self._epoch: tuple[int, torch.Tensor] | None = None  # its number, and its order, made once

    def of_step(self, step: int) -> list[int]:
        """The places of a step's groups; steps count from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
            self._epoch = epoch, torch.randperm(self.num_groups, generator=generator)
        return self._epoch[1][place * self.per_step : (place + 1) * self.per_step].tolist()

    def is_due(self, every: float, step: int) -> bool:
        """Whether what comes `every` so many steps (below 1: so much of an epoch), and at the end, comes after `step`."""
        interval = every if every >= 1 else max(1, round(every * self.steps_per_epoch))
        return step % interval == 0 or step == self.total_steps


def mixed(seed: int, number: int) -> int:
    """A seed of its own for each number, far apart from the neighbours'."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % 2**63
