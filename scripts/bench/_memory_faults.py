"""Memory running out at every place of a command, in the words of every library."""

import functools
import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _fault_cases import CASES, Case, Reference, make_templates
from _faults import Lab, Ran

BY_NAME = {case.name: case for case in CASES}
REDONE = "is done again in micro-batches of"
# A rate at which two steps make the model worse: the best weights are the start's.
RUINED = Case("train", ("train", "../lora.yaml", "train.learning_rate=3"), "tokens")
TRAINED = Case("train", ("train", "../lora.yaml"), "tokens")


def _trains(*_: Any, backward: Any = None, **__: Any) -> bool:
    return backward is not None


def _evaluates(*_: Any, backward: Any = None, **__: Any) -> bool:
    return backward is None


@dataclass(frozen=True)
class Place:
    """A function that runs out of memory at one of its calls: before it does anything, or once all is done."""

    name: str
    case: Case
    target: str  # module:name, or module:class.name
    at: int = 1
    when: Callable[..., bool] = lambda *_, **__: True  # which of its calls count
    is_done: bool = False
    is_redone: bool = False  # else the command ends with advice

    def break_it(self, make_error: Callable[[], BaseException]) -> None:
        """In this process, once."""
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        inner = getattr(owner, name)
        seen, lock = [0], threading.Lock()

        @functools.wraps(inner)
        def broken(*args: Any, **kwargs: Any) -> Any:
            with lock:
                seen[0] += self.when(*args, **kwargs)
                fails = seen[0] == self.at and self.when(*args, **kwargs)
            if not fails or self.is_done:
                result = inner(*args, **kwargs)
            if fails:
                raise make_error()
            return result

        setattr(owner, name, broken)

    def problems(self, ran: Ran, error: BaseException) -> list[str]:
        """One message and exit 2, or the step done again and exit 0; reached in either case."""
        problems = self.case.failed_well(ran)
        is_redone = self.is_redone and isinstance(error, Exception)  # which a sharded checkpoint's is not
        if ran.code != (0 if is_redone else 2):
            problems.append("not reached" if ran.code == 0 else f"exit {ran.code}")
        said = REDONE if is_redone else "out of memory"
        return problems if said in ran.printed else [*problems, f"does not say {said!r}"]


SESSION, WEIGHTS = "qorpo.training.session", "qorpo.training.weights"
STATES = "bitsandbytes.optim.optimizer:Optimizer2State"
FULL = BY_NAME["full train"]
PLACES = (
    Place("reading rows", BY_NAME["data"], "qorpo.data.prepare:iter_examples"),
    Place("tokenizing", BY_NAME["data"], "qorpo.data.prepare:tokenize_batch"),
    Place("the model", TRAINED, "qorpo.training.run:load_model"),
    Place("adapters", TRAINED, f"{WEIGHTS}:attach_lora"),
    Place("the check at load", TRAINED, "qorpo.model.selfcheck:observed", at=2),
    Place("forward", TRAINED, f"{SESSION}:run_step", when=_trains, is_redone=True),
    Place("backward", TRAINED, "accelerate:Accelerator.backward", is_done=True, is_redone=True),
    Place("clipping", TRAINED, "accelerate:Accelerator.clip_grad_norm_", is_done=True, is_redone=True),
    Place("evaluation", TRAINED, f"{SESSION}:run_step", when=_evaluates, is_redone=True),
    Place("the optimizer's states, by bitsandbytes", TRAINED, f"{STATES}.init_state", at=3),
    Place("the optimizer's step, half way", TRAINED, f"{STATES}.update_step", at=3, is_done=True),
    Place("the optimizer's states, by torch", FULL, "torch.optim:AdamW._init_group", at=2),
    Place("figures", TRAINED, "qorpo.training.metrics:Metrics._read"),
    Place("metrics", TRAINED, "qorpo.training.run_folder:RunFolder.append_metrics"),
    Place("a tracker", BY_NAME["trackers"], "accelerate:Accelerator.log"),
    Place("a checkpoint's adapter", TRAINED, f"{WEIGHTS}:save_adapter", at=2),
    Place("a checkpoint's optimizer", TRAINED, f"{WEIGHTS}:_save_tensors", at=2),
    Place("a checkpoint's shards", FULL, f"{WEIGHTS}:save_shards", at=2),
    Place("the best weights", RUINED, f"{WEIGHTS}:load_adapter"),
    Place("the adapter", TRAINED, "qorpo.training.loop:Trainer.save"),
    Place("the model of full tuning", FULL, f"{WEIGHTS}:save_whole_model"),
    Place("resuming, the adapter", BY_NAME["resume"], f"{WEIGHTS}:load_adapter"),
    Place("resuming, the optimizer", BY_NAME["resume"], f"{WEIGHTS}:load_optimizer_state"),
    Place("resuming, shards", BY_NAME["full resume"], f"{WEIGHTS}:load_shards"),
    Place("merging", BY_NAME["merge"], "qorpo.merging.shards:Stored.load"),
    Place("verification, the model", BY_NAME["verify"], "qorpo.merging.verify:load_model", at=2),
    Place("verification, a forward", BY_NAME["verify"], "qorpo.merging.verify:score_groups"),
    Place("verification, distributions", BY_NAME["verify"], "qorpo.merging.verify:next_token_logps"),
    Place("export", BY_NAME["export"], "qorpo.training.export:read_parameters"),
)


def shortages(lab: Lab, place: Place, every: int, add: Callable[..., None]) -> None:
    """Each kind of error at this place; after the first the command's own remedy is tried.

    Args:
        add: told of each trial: its kind, how it ended, problems, and what ran.
    """
    from helpers.shortages import SHORTAGES

    make_templates(lab)
    for number, (kind, make_error) in enumerate(list(SHORTAGES.items())[::every]):
        lab.start(place.case.template)
        ran = lab.run(place.case.argv, before=functools.partial(place.break_it, make_error))
        runs, problems = [ran], place.problems(ran, make_error())
        if number == 0 and not place.is_redone:
            runs += place.case.go_on(lab)
            problems += place.case.ended_well(runs[1:]) + Reference.of(lab, place.case).differences(lab)
        end = {0: "done again", 2: "advice"}.get(ran.code, "uncaught")
        add(kind, end, problems, *runs)
