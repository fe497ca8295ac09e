"""One rank of a run, for tests: `python ranks.py JOB.json`, alone or under torchrun, on the CPU over gloo.

accelerate leaves FSDP out on the CPU; the shim below is all that differs from a cluster. A job is
{"recipe", "dtype", "output", "kill": [rank, step], "sgd": bool}. With "output" the gradients of every step, the
losses and the final weights are saved there by the main rank.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
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
        if job["recipe"].get("tuning") == "full" and not job.get("unshimmed"):
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
            if job.get("output"):
                self.seen["gradients"].append([whole(parameter.grad).clone() for parameter in parameters])
            return clip(parameters, norm)

        self.accelerator.clip_grad_norm_ = seen
        step(self)
        self.accelerator.clip_grad_norm_ = clip

    def flushing(self):
        means = flush(self)
        self.seen["losses"].append(means["loss"])
        return means

    def training(self, **options):
        self.seen = {"gradients": [], "losses": []}
        return train(self, **options)

    def saving(self, folder):  # the last thing before the processes part
        save(self, folder)
        self.seen["weights"] = [whole(parameter).detach().clone() for parameter in self.trained]
        self.seen["local_numel"] = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in self.trained)

    trainer_class._step, trainer_class._flush_metrics = stepping, flushing
    trainer_class.train, trainer_class.save = training, saving


if __name__ == "__main__":
    main()
