"""One rank of a run, for tests: `python ranks.py JOB.json`, alone or under torchrun, on the CPU over gloo.

accelerate leaves FSDP out on the CPU; the shim below is all that differs from a cluster. A job is
{"recipe", "dtype", "output", "kill": [rank, step], "sgd": bool, "profile": step}. With "output" the gradients of every
step, the losses, the final weights and the bytes it holds are saved there by the main rank.
"""

import json
import os
import signal
import sys
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import qorpo
import qorpo.training.loop as loop
from qorpo.model.load import load_tokenizer
from qorpo.recipe import load_recipe
from qorpo.training.distributed import whole


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True)
        recipe = job["recipe"]
        if recipe.get("tuning") == "full" or recipe.get("memory", {}).get("sharding") == "full":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if job.get("sgd"):
        loop.make_optimizer = lambda parameters, recipe: torch.optim.SGD(parameters, recipe.learning_rate)
    watch(loop.Trainer, job)
    if job.get("dtype"):
        result = from_parts(job)
    else:
        result = qorpo.train(job["recipe"], resume=job.get("resume", False)).trainer
    if PartialState().is_main_process and job.get("output"):
        torch.save(result.seen, job["output"])


def from_parts(job):
    recipe = load_recipe(job["recipe"])
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=getattr(torch, job["dtype"]))
    trainer = loop.Trainer(
        model, load_tokenizer(recipe.model.path), recipe, qorpo.load_pairs(recipe.data.train[0])
    )
    trainer.train(resume=job.get("resume", False))
    return trainer


def watch(trainer_class, job) -> None:
    """Note gradients, losses and weights, and kill a rank where the job says so."""
    step, flush = trainer_class._step, trainer_class._flush_metrics
    train, save = trainer_class.train, trainer_class.save

    def stepping(self):
        rank, at = job.get("kill", (None, None))
        if PartialState().process_index == rank and self.state.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        clip = self.accelerator.clip_grad_norm_

        def seen(parameters, norm):
            if job.get("output") and "profile" not in job:
                self.seen["gradients"].append([whole(parameter.grad).clone() for parameter in parameters])
                self.seen["bytes"]["gradients"] = local_bytes(parameter.grad for parameter in parameters)
            return clip(parameters, norm)

        self.accelerator.clip_grad_norm_ = seen
        if job.get("profile") == self.state.step:
            profiled(self, lambda: step(self))
        else:
            step(self)
        self.accelerator.clip_grad_norm_ = clip

    def flushing(self):
        means = flush(self)
        self.seen["losses"].append(means["loss"])
        return means

    def training(self, **options):
        self.seen = {"gradients": [], "losses": [], "bytes": {}}
        return train(self, **options)

    def saving(self, folder):  # the last thing before the processes part
        save(self, folder)
        self.seen["weights"] = [whole(parameter).detach().clone() for parameter in self.trained]
        self.seen["bytes"] |= standing_bytes(self)

    trainer_class._step, trainer_class._flush_metrics = stepping, flushing
    trainer_class.train, trainer_class.save = training, saving


def local_bytes(tensors) -> int:
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def standing_bytes(trainer) -> dict[str, int]:
    """What this rank holds between steps."""
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {
        "base": local_bytes(p for p in trainer.model.parameters() if not p.requires_grad),
        "parameters": local_bytes(trainer.trained),
        "optimizer": local_bytes(value for value in states if torch.is_tensor(value)),
    }


def profiled(trainer, step) -> None:
    """Note the most that a step adds to what this rank holds, as torch's profiler sees it, and the pairs it scored."""
    pairs = trainer.pairs_of_step(trainer.state.step)
    rows = trainer.ranks.micro_batches(pairs, int(trainer.recipe.memory.microbatch_tokens))
    trainer.seen["rows"] = [
        [len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)] for pair in rows[0]
    ]
    trainer.seen["standing_bytes"] = sum(standing_bytes(trainer).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    levels = list(accumulate(event.nbytes() for event in changes))
    trainer.seen["added_bytes"], trainer.seen["left_bytes"] = max(levels), levels[-1]


if __name__ == "__main__":
    main()
