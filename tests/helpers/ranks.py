"""One rank of several runs, one after another: `python ranks.py JOBS.json`, alone or under torchrun, over gloo.

accelerate leaves FSDP out on the CPU; the shim below is all that differs from a cluster. A job is
{"recipe", "dtype", "output", "kill": [rank, step], "resume", "sgd": bool, "profile": step, "per_node": ranks,
"forgets": bool}. With "output" the main rank saves there what it saw: the gradients of every step, the losses, the final
weights, the bytes it held; with "profile" instead of gradients the memory of that step; with "forgets" only what the
check at load says of packed attention whose backward forgets a part.
"""

import json
import os
import signal
import sys
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import qorpo
import qorpo.model.scoring as scoring
import qorpo.training.loop as loop
import qorpo.training.run as run
import qorpo.training.session as session
from qorpo.engine.distributed import gathered
from qorpo.errors import ModelError
from qorpo.model.load import load_model, load_tokenizer
from qorpo.recipe import load_recipe

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
make_optimizer = session.make_optimizer


def main() -> None:
    torch.set_num_threads(1)
    *first, last = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    destroy = AcceleratorState.destroy_process_group
    AcceleratorState.destroy_process_group = lambda *args: None  # the next run needs it
    for job in first:
        do(job)
    AcceleratorState.destroy_process_group = destroy
    do(last)


def do(job) -> None:
    recipe = load_recipe(job["recipe"])
    if RANKS > 1:
        sharded = recipe.tuning == "full" or recipe.memory.sharding in ("full", "hybrid")
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = (
            DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU
        )
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ["LOCAL_WORLD_SIZE"] = str(job.get("per_node", RANKS))
    session.make_optimizer = sgd if job.get("sgd") else make_optimizer
    WatchedTrainer.job = job
    if job.get("forgets"):
        note_refusal(recipe, Path(job["output"]))
        return
    if job.get("dtype"):
        model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=getattr(torch, job["dtype"]))
        pairs = qorpo.load_pairs(recipe.data.train[0])
        trainer = WatchedTrainer(model, load_tokenizer(recipe.model.path), recipe, pairs)
        trainer.train(resume=job.get("resume", False))
    else:
        run.Trainer = WatchedTrainer
        trainer = qorpo.train(recipe, resume=job.get("resume", False)).trainer
    if trainer.session.accelerator.is_main_process and "output" in job:
        torch.save(trainer.seen, job["output"])


def note_refusal(recipe, output: Path) -> None:
    """What the check says where, in packed rows, the first layer's keys give nothing back to what they were made of."""
    model = load_model(recipe.model.path, quantization=recipe.model.quantization)
    keys = model.model.layers[0].self_attn.k_proj
    layout_of = scoring.PackedLayout.of

    def forgetful(packed, kernel):
        keys.register_forward_hook(lambda module, arguments, made: made.detach())
        return layout_of(packed, kernel)

    scoring.PackedLayout.of = forgetful
    try:
        loop.Trainer(model, load_tokenizer(recipe.model.path), recipe, qorpo.load_pairs(recipe.data.train[0]))
        said = "nothing"
    except ModelError as error:
        said = str(error)
    scoring.PackedLayout.of = layout_of
    if PartialState().is_main_process:
        torch.save(said, output)


def sgd(parameters, recipe, *_):
    return torch.optim.SGD(parameters, recipe.learning_rate)


class WatchedTrainer(loop.Trainer):
    """Notes what a rank sees, and dies where the job says so."""

    job = None

    def train(self, **options):
        self.seen = {"gradients": [], "losses": [], "bytes": {}}
        clip = self.session.accelerator.clip_grad_norm_

        def seen(parameters, norm):
            if "output" in self.job and "profile" not in self.job:
                self.seen["gradients"].append([gathered(parameter.grad).clone() for parameter in parameters])
                self.seen["bytes"]["gradients"] = local_bytes(parameter.grad for parameter in parameters)
            return clip(parameters, norm)

        self.session.accelerator.clip_grad_norm_ = seen
        return super().train(**options)

    def _step(self):
        rank, at = self.job.get("kill", (None, None))
        if self.session.ranks.index == rank and self.state.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.job.get("profile") == self.state.step:
            self._profile(super()._step)
        else:
            super()._step()

    def flush_metrics(self):
        super().flush_metrics()
        self.seen["losses"].append(self.metrics.last_step["loss"])

    def save(self, folder):  # the last thing before the processes part
        super().save(folder)
        self.seen["weights"] = [gathered(parameter).detach().clone() for parameter in self.session.trained]
        self.seen["bytes"] |= self._standing_bytes()

    def _standing_bytes(self) -> dict[str, int]:
        """What this rank holds between steps."""
        states = [value for state in self.session.optimizer.state.values() for value in state.values()]
        return {
            "base": local_bytes(p for p in self.model.parameters() if not p.requires_grad),
            "parameters": local_bytes(self.session.trained),
            "optimizer": local_bytes(value for value in states if torch.is_tensor(value)),
        }

    def _profile(self, step) -> None:
        """Note the most that a step adds to what this rank holds, as torch's profiler sees it, and its pairs."""
        pairs = self.groups_of_step(self.state.step)
        rows = self.session.ranks.micro_batches(pairs, int(self.recipe.memory.microbatch_tokens))
        self.seen["rows"] = [list(pair.lengths) for pair in rows[0]]
        self.seen["standing_bytes"] = sum(self._standing_bytes().values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
        changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        self.seen["added_bytes"] = max(accumulate(event.nbytes() for event in changes))


def local_bytes(tensors) -> int:
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


if __name__ == "__main__":
    main()
