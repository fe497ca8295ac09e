"""What can go wrong that a person can fix, by kind. Each message names the place, the value and the remedy.

The command line turns a QorpoError into one message and exit code 2; anything else is a fault of qorpo's own
and exits with 1.
"""


class QorpoError(Exception):
    """Something the user did or gave that can't work; the message says where, what, and what to do."""


class RecipeError(QorpoError):
    """A recipe that can't be read or does not hold together; lists every problem at once."""


class DataError(QorpoError):
    """Preference data that can't be read, or of which nothing usable is left."""


class ModelError(QorpoError):
    """A model or tokenizer folder that can't be loaded, or a model qorpo can't score exactly."""


class PlanError(ModelError):
    """A model of which no memory plan can be made, as its own code doesn't run on fake tensors."""


class RunError(QorpoError):
    """A run folder in the way, a checkpoint that doesn't fit, a disk that is full."""


class DamageError(QorpoError):
    """A file that is not what was written: a flipped bit, a part that is missing; or one that belongs to something else."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run between two steps; the message says what is saved and how to go on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
