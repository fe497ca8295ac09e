"""Qorpo's commands in forked children of one process that has imported all of it, with a fault in each.

A start of Python with torch and transformers takes seconds, a fork of one that has started milliseconds. Nothing here
computes with torch, since threads that it would start don't survive a fork.
"""

import atexit
import contextlib
import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before torch, transformers and datasets are imported. Each trial has its own cache, in its own folder.
os.environ |= {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": "cache", "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

from _record import ROOT
from _syscalls import Fault, run_child

sys.path.insert(0, str(ROOT / "tests"))
TIMES = {"tokens_per_second", "pairs_per_second", "eval_pairs_per_second", "peak_memory_gib"}


@dataclass(frozen=True)
class Ran:
    """One command's end."""

    code: int  # negative: the signal that killed it
    printed: str  # both streams
    calls: list[tuple[str, str]]
    mapped: set[str]
    outside: set[str]

    @property
    def last(self) -> str:
        """The call that the fault hit, for a report."""
        return " ".join(self.calls[-1]) if self.calls else "no call"


class Lab:
    """A folder with a tiny base, pairs and recipes, and one folder a trial beside them."""

    def __init__(self, home: Path):
        self.home = home
        self.trial = home / "trial"
        self.templates = home / "templates"
        self.templates.mkdir(parents=True)

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator["Lab"]:
        _import_all()
        home = Path(tempfile.mkdtemp(prefix="qorpo-faults-")).resolve()
        try:
            lab = cls(home)
            made = run_child(lab._make, home / "unwatched", None)
            if made.code:
                raise SystemExit("faults: the tiny base could not be made")
            yield lab
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _make(self) -> int:
        import yaml
        from helpers.tiny import changed, make_base, preference_records, short_recipe, write_records

        make_base(self.home / "base", num_hidden_layers=1)
        write_records(self.home / "pairs.jsonl", preference_records()[:16])
        common = short_recipe(Path("../base"), Path("../pairs.jsonl"), Path("run"))
        common = changed(
            common, data__eval=0.25, train__pairs_per_step=4, train__max_steps=2, train__eval_every=1,
            train__save_every=1, train__log_every=1, train__keep_checkpoints=1,
        )  # fmt: skip
        for name, recipe in {
            "lora": changed(common, model__quantization="none"),
            "full": changed(common, tuning="full", train__optimizer="adamw_torch"),
        }.items():
            (self.home / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return 0

    def start(self, template: str | None = None) -> None:
        """A fresh folder for a trial: empty, or a copy of a template."""
        shutil.rmtree(self.trial, ignore_errors=True)
        if template:
            shutil.copytree(self.templates / template, self.trial, symlinks=True)
        (self.trial / "tmp").mkdir(parents=True, exist_ok=True)

    def keep(self, template: str) -> None:
        """Keep the trial's folder as it is, to start others from."""
        shutil.copytree(self.trial, self.templates / template, symlinks=True)

    def run(
        self, argv: Sequence[str], fault: Fault | None = None, before: Callable[[], None] = lambda: None
    ) -> Ran:
        """`qorpo` in the trial's folder, in a process that `before` may have changed."""
        printed = self.home / "printed"

        def body() -> int:
            descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(self.trial)
            tempfile.tempdir = str(self.trial / "tmp")
            before()
            return _qorpo(argv)

        outcome = run_child(body, self.trial, fault)
        text = printed.read_text(encoding="utf-8", errors="replace")
        outside = {path for path in outcome.outside if not path.startswith(str(self.home))}
        return Ran(outcome.code, text, outcome.calls, outcome.mapped, outside)


def _import_all() -> None:
    """Whatever the commands import, so that no child has to."""
    import accelerate.tracking  # noqa: F401
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import qorpo.cli
    import qorpo.data.inspect
    import qorpo.merging.bytes_written
    import qorpo.merging.merge
    import qorpo.reports.data_report
    import qorpo.training.export
    import qorpo.training.progress
    import qorpo.training.run  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # a table that is made once, in a third of a trial's time
    gc.collect()
    gc.freeze()  # or a child's first collection copies every page


def _qorpo(argv: Sequence[str]) -> int:
    """The command line as a process of its own runs it, what Python does at the end of one included."""
    import traceback

    from qorpo.cli import main

    sys.argv = ["qorpo", *argv]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as the end of a process does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
