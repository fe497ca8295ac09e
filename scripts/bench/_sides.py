"""A training run of qorpo or of a peer, in a process of its own: what a side is, and what all of them are given.

All have LoRA rank 16 on all linear layers, the same pairs to a step in the same order, the same tokens (TRL's own would
hold the template's line break and a second stop token after each answer), torch's AdamW at the same learning rate, the
same cap on memory, no evaluation. Beyond that each keeps its defaults, but for what a run says:

    qorpo    microbatch_tokens, activation_checkpointing
    trl      TRL's ORPOTrainer: batch (pairs to a forward pass, with accumulation to match), checkpointing, liger
             (Liger's RMSNorm, RoPE and SwiGLU); on CUDA with flash-attn where that is installed
    unsloth  the same trainer on Unsloth's model: batch, checkpointing. Written by its documentation; not run yet.

The first step is warm-up and not timed. Memory is the peak from the loaded model to the end of training, above the
loaded model. NF4 on the CPU: bitsandbytes' repacked kernel, which has no gradient, is kept off.
"""

import importlib.util
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _models import config_of, plain_tokenizer, random_model
from _record import ExtraMemory
from _training import LORA, Clock, longest_sequence, train

from qorpo.data.counts import DataReport
from qorpo.data.groups import Group, GroupLengths, TokenizedData
from qorpo.model.load import load_model, load_tokenizer
from qorpo.out_of_memory import is_out_of_memory
from qorpo.planning.auto import cap_card

# transformers' trainer would take every card there is.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

LEARNING_RATE = 1e-4
OPTIMIZER = {"cpu": "adamw_torch", "cuda": "adamw_torch_fused"}
NEEDS = {"qorpo": (), "trl": ("trl", "datasets"), "unsloth": ("unsloth", "trl", "datasets")}
LIGER_TRUNK = {
    "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False,
}  # fmt: skip

Settings = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every side is given."""

    pairs: Sequence[Group]  # whole steps of them, at least two
    pairs_per_step: int
    base: str | None = None  # a model's folder, or demo
    shape: str | None = None  # one of `_models.SHAPES` in its place
    nll_tokens: str = "all"
    quantization: str = "nf4"
    device: str = "cpu"
    threads: int = 2
    cap_gib: float | None = None

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.pairs_per_step

    @property
    def timed_lengths(self) -> list[GroupLengths]:
        return [pair.lengths for pair in self.pairs[self.pairs_per_step :]]


def missing(side: str) -> list[str]:
    """Packages without which a side can't run."""
    return [name for name in NEEDS[side] if importlib.util.find_spec(name) is None]


def in_own_process(run: Settings, job: Job) -> Figures:
    side = run["side"]
    if names := missing(side):
        return {"error": f"can't be imported: {', '.join(names)}"}
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure, args=(run, job, theirs), name=side)
    # qorpo bounds oneDNN's cache for its own process; peers have what their users have.
    before = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = before if side == "qorpo" else "1024"
    process.start()
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = before
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return {"error": "the process ended; out of memory?"}
    finally:
        process.join()


def measure(run: Settings, job: Job, pipe: Any) -> None:
    """One run in this process; sends its figures, or what went wrong."""
    os.dup2(2, 1)  # what the libraries print is no result
    torch.set_num_threads(job.threads)
    logging.getLogger("qorpo").setLevel(logging.WARNING)
    side = {"qorpo": run_qorpo, "trl": run_trl, "unsloth": run_unsloth}[run["side"]]
    try:
        if job.cap_gib is not None:
            cap_card(job.cap_gib, torch.device(job.device))
        step_ends, losses, memory = side(run, job)
        timed_pairs = job.pairs_per_step * (len(step_ends) - 1)
        seconds, cpu_seconds = (last - first for first, last in zip(step_ends[0], step_ends[-1], strict=True))
        pipe.send(
            {
                "pairs_per_second": timed_pairs / seconds,
                "pairs_per_cpu_second": timed_pairs / cpu_seconds,
                **memory.figures(),
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "steps": len(step_ends),
            }
        )
    except Exception as error:
        pipe.send(failure(error))
        raise


def failure(error: Exception) -> Figures:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return {
        "error": f"{type(error).__name__}: {first_line}",
        "out_of_memory": is_out_of_memory(error),
    }


def load(job: Job) -> tuple[Any, Any]:
    """The model on its device, and a tokenizer."""
    if job.shape is None:
        tokenizer = load_tokenizer(job.base)
        return load_model(job.base, quantization=job.quantization, device=job.device), tokenizer
    model = random_model(config_of(job.shape), torch.device(job.device), quantization=job.quantization)
    return model, plain_tokenizer()


Outcome = tuple[list[tuple[float, float]], list[float], ExtraMemory]
"""When steps ended, their losses, and the memory taken from the loaded model on."""


def run_qorpo(run: Settings, job: Job) -> Outcome:
    model, tokenizer = load(job)
    memory = ExtraMemory(job.device)
    done = train(
        model, tokenizer, TokenizedData(list(job.pairs), DataReport(kept=len(job.pairs))),
        steps=job.steps, pairs_per_step=job.pairs_per_step,
        recipe={
            "model": {"quantization": job.quantization},
            "objective": {"nll_tokens": job.nll_tokens, "nll_average": "token"},
            "train": {"learning_rate": LEARNING_RATE, "optimizer": OPTIMIZER[job.device]},
            "memory": {
                "budget_gib": job.cap_gib or "auto",
                "microbatch_tokens": run["microbatch_tokens"],
                "activation_checkpointing": run["activation_checkpointing"],
            },
        },
    )  # fmt: skip
    return done.step_ends, done.losses, memory


def run_trl(run: Settings, job: Job) -> Outcome:
    from peft import LoraConfig

    model, tokenizer = load(job)
    if job.device == "cuda" and importlib.util.find_spec("flash_attn"):
        model.set_attn_implementation("flash_attention_2")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=LORA["targets"]
    )
    return train_by_trl(run, job, model, tokenizer, lora)


def run_unsloth(run: Settings, job: Job) -> Outcome:
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as scratch:
        path = job.base
        if job.shape is not None:  # Unsloth reads models from folders alone
            path = str(Path(scratch) / "base")
            config, device = config_of(job.shape), torch.device(job.device)
            random_model(config, device, quantization="none").save_pretrained(path)
            plain_tokenizer().save_pretrained(path)
        longest = max(map(longest_sequence, job.pairs))
        model, tokenizer = FastLanguageModel.from_pretrained(
            path, max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=job.quantization == "nf4"
        )
    model = FastLanguageModel.get_peft_model(
        model, r=LORA["rank"], lora_alpha=LORA["alpha"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if run["checkpointing"] else False,
    )  # fmt: skip
    return train_by_trl(run, job, model, tokenizer, lora=None)


def train_by_trl(run: Settings, job: Job, model: Any, tokenizer: Any, lora: Any) -> Outcome:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class StepEnds(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step(state.global_step)

    class SameTokens(ORPOTrainer):
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            prompt, *answers = feature["ids"]
            row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
            for name, answer in zip(("chosen", "rejected"), answers, strict=True):
                ids = prompt + answer
                row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
                row[f"{name}_labels"] = [-100] * len(prompt) + answer
            return row

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"prompt": "", "chosen": "", "rejected": "", "ids": [p.prompt_ids, p.responses[0], p.responses[1]]}
        for p in job.pairs
    ]
    clock = Clock(job.device)
    with tempfile.TemporaryDirectory() as scratch:
        config = ORPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=run["batch"],
            gradient_accumulation_steps=job.pairs_per_step // run["batch"],
            gradient_checkpointing=run["checkpointing"]
            and lora is not None,  # Unsloth's model does it by itself
            use_liger_kernel=run.get("liger", False),
            liger_kernel_config=LIGER_TRUNK,
            max_steps=job.steps,
            max_length=max(map(longest_sequence, job.pairs)),
            learning_rate=LEARNING_RATE,
            optim=OPTIMIZER[job.device],
            lr_scheduler_type="cosine",
            warmup_steps=-(-job.steps // 10),
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=job.device == "cpu",
        )
        memory = ExtraMemory(job.device)
        trainer = SameTokens(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=lora, callbacks=[StepEnds()],
        )  # fmt: skip
        trainer.train()
    return clock.step_ends, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], memory
