"""Evaluate a model on what is asked for: everything checked first, then the answers, then what needs the model loaded."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qorpo.data.groups import Group
from qorpo.engine.device import computing_device
from qorpo.engine.within_memory import free_memory
from qorpo.errors import DamageError, RecipeError
from qorpo.evaluation import diversity, harness, ifeval, pairs
from qorpo.evaluation.results import Result, check_output, write_results
from qorpo.generation.generate import Progress, generate
from qorpo.generation.load import Opened, find_model
from qorpo.recipe import Recipe, load_recipe
from qorpo.storage import read_note

logger = logging.getLogger(__name__)

NAME = "evaluation.json"  # in the run folder: the latest result of each evaluation
ANSWERS = "evaluation"  # the folder beside it


@dataclass(frozen=True)
class Options:
    """How to evaluate; `evaluate` says what each means."""

    against: str | None = None
    limit: int | None = None
    samples: int = 5
    temperature: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    batch_size: int = 64
    nltk_data: str | os.PathLike[str] | None = None
    encoder: str = diversity.ENCODER
    task_folder: str | os.PathLike[str] | None = None
    how_to_load: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"--limit: got {self.limit}; expected 1 or more")


@dataclass(frozen=True)
class Evaluated:
    """What every evaluation came to, in the order asked for, and the files that hold it."""

    model: str
    results: list[Result]
    written: list[Path]


def evaluate(
    model: str | os.PathLike[str],
    on: str | Sequence[str],
    *,
    output: str | os.PathLike[str] | None = None,
    against: str | None = None,
    limit: int | None = None,
    samples: int = 5,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    nltk_data: str | os.PathLike[str] | None = None,
    encoder: str = diversity.ENCODER,
    task_folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **how_to_load: Any,
) -> Evaluated:
    """Evaluate a run, an adapter, a merged folder or any model.

    Results go into the run folder's evaluation.json where there is one, and to `output`. Answers are kept beside it
    as they come, so that after a kill the same call goes on.

    Args:
        on: one or several of `pairs:FILE` (preference pairs, whatever `data.train` takes), `ifeval` or `ifeval:FILE`,
            `lm-eval:TASK,…`, `diversity:FILE` (prompts).
        against: of pairs: the model to compare with, or none. None: an adapter's base, a full run's start.
        limit: take the first so many pairs, prompts, or documents of each task.
        samples, temperature: of diversity: answers a prompt, and how they are drawn; `seed` of these draws.
        max_new_tokens: the most tokens of an answer; None: 1,280 for ifeval as the harness has it, 512 for diversity.
        batch_size: the most answers, or the harness' requests, at once.
        nltk_data: of ifeval: NLTK's data folder; None: NLTK's own, or a package's.
        encoder: of diversity: a sentence-transformers model, by folder or hub id.
        task_folder: of lm-eval: a folder with tasks of your own.
        how_to_load: quantization, dtype, base, revision, allow_pickle, trust_remote_code, as `load` has them.

    Raises:
        QorpoError: what the user can fix, before weights are read where that can be known.
    """
    options = Options(
        against, limit, samples, temperature, seed, max_new_tokens, batch_size, nltk_data, encoder, task_folder,
        how_to_load,
    )  # fmt: skip
    asked = [on] if isinstance(on, str) else list(on)
    place = None if output is None else Path(output).expanduser()
    if place is not None:
        check_output(place)
    subject = _Subject(str(model), place, options, progress)
    if subject.run is not None:
        check_output(subject.run / NAME)
    jobs = [_job(each, subject) for each in dict.fromkeys(asked)]
    # Answers are made by a model that is loaded for them and goes again; what else needs it loads it once.
    found: dict[int, Result] = {}
    written: list[Path] = []
    for job in sorted(jobs, key=lambda job: not job.generates):
        found[id(job)] = job.run()
        # At once, so that what fails after it costs nothing.
        written = subject.write([found[id(each)] for each in jobs if id(each) in found])
    return Evaluated(subject.opened.name, [found[id(job)] for job in jobs], written)


class _Subject:
    """The model that is evaluated, loaded once, and where what becomes of it is kept."""

    def __init__(self, path: str, output: Path | None, options: Options, progress: Progress | None):
        self.path, self.output, self.options, self.progress = path, output, options, progress
        self.opened: Opened = find_model(path, **options.how_to_load)
        folder = Path(path).expanduser()
        self.run = folder if (folder / "recipe.yaml").is_file() else None

    @cached_property
    def recipe(self) -> Recipe | None:
        if self.opened.trained is not None:
            return self.opened.trained.recipe
        return load_recipe(self.run / "recipe.yaml") if self.run else None

    @cached_property
    def model(self) -> Any:
        return self.opened.model()

    def base(self) -> Opened | None:
        """The model to compare with, where that is not the same one with its adapter off."""
        keys = self.recipe.model if self.recipe else None
        if self.options.against == "none" or (
            self.options.against is None and self.opened.trained is not None
        ):
            return None
        if self.options.against is not None:
            found = find_model(self.options.against, **self._trust())
        elif self.recipe and self.recipe.tuning == "full" and keys:
            found = find_model(keys.path, revision=keys.revision, **self._trust())
        else:
            return None
        if found.chat.tokenizer.get_vocab() != self.opened.chat.tokenizer.get_vocab():
            raise RecipeError(
                f"--against {found.path}: has another tokenizer than {self.path}; compare models that share it"
            )
        return found

    def _trust(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in self.options.how_to_load.items()
            if k in ("allow_pickle", "trust_remote_code", "dtype")
        }

    def answers(
        self, name: str, prompts: list[Any], count: int, **how: Any
    ) -> tuple[list[list[str]], dict[str, Any]]:
        """`count` answers to each prompt, and what making them took; kept where results are, and taken from there."""
        how |= {"batch_size": self.options.batch_size, "progress": self.progress, **self.options.how_to_load}
        made_with = [
            self.opened.identity(),
            prompts,
            {k: how[k] for k in sorted(how) if k not in ("batch_size", "progress")},
        ]
        digest = hashlib.sha256(json.dumps(made_with, sort_keys=True, default=str).encode()).hexdigest()[:12]
        place = None
        if home := self.run or (self.output.parent if self.output else None):
            place = home / ANSWERS / f"{name}-{digest}.jsonl"
        notes: dict[str, Any] = {"answers": str(place)} if place else {}
        if place and place.is_file():  # of these prompts, model and settings: it would be the same again
            flat = _kept(place, len(prompts) * count)
            logger.info("%s: the answers in %s are taken", name, place)
        else:
            made = generate(self.path, prompts, place, format="jsonl", **how)
            flat = [each.text for each in made.answers]
            notes["cut at the longest length"] = sum(not each.is_finished for each in made.answers)
            if made.seconds:
                notes |= {
                    "tokens": made.tokens,
                    "seconds": round(made.seconds),
                    "tokens a second": round(made.tokens / made.seconds),
                }
            free_memory()
        return [flat[start : start + count] for start in range(0, len(flat), count)], notes

    def write(self, results: Sequence[Result]) -> list[Path]:
        """Into the run folder, where earlier evaluations of other kinds stay, and to the output."""
        found, written = {each.on: each.as_dict() for each in results}, []
        if self.run is not None:
            known = (read_note(self.run / NAME) or {}) if (self.run / NAME).exists() else {}
            write_results(self.run / NAME, {**known, **found})
            written.append(self.run / NAME)
        if self.output is not None:
            write_results(self.output, {"model": self.opened.name, "results": found})
            written.append(self.output)
        return written


def _kept(place: Path, expected: int) -> list[str]:
    try:
        flat = [str(json.loads(line)["response"]) for line in place.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{place}: is no file of answers ({error}); remove it to answer anew") from error
    if len(flat) != expected:
        raise DamageError(f"{place}: holds {len(flat)} answers of {expected}; remove it to answer anew")
    return flat


# --- what can be asked for; each is checked as it is made, and run afterwards ---


class _Pairs:
    generates = False

    def __init__(self, source: str, subject: _Subject):
        self.source, self.subject = source, subject
        self.data = pairs.read_pairs(source, subject.recipe, subject.opened.chat, subject.options.limit)
        self.base = subject.base()

    def run(self) -> Result:
        groups: Sequence[Group] = self.data.groups
        can_switch_off = self.subject.opened.trained is not None and self.subject.options.against is None
        objective = pairs.objective_of(self.subject.recipe, groups, can_switch_off or self.base is not None)
        attention = self.subject.recipe.model.attention if self.subject.recipe else "auto"
        other: pairs.Metrics | None = None
        if self.base is not None:  # scored and gone before the model itself is loaded
            scorer = pairs.PairsScorer(self.base.model(), attention)
            groups = scorer.as_reference(groups) if objective.needs_reference else groups
            other = scorer.metrics(groups, objective)
            del scorer
            free_memory()
        own = pairs.PairsScorer(self.subject.model, attention)
        if can_switch_off:
            with self.subject.model.disable_adapter():
                groups = own.as_reference(groups) if objective.needs_reference else groups
                other = own.metrics(groups, objective)
        against = self.base.path if self.base else "the adapter's base" if other is not None else None
        notes = {
            "pairs": len(groups),
            "prompts": len({group.prompt_ids for group in groups}),
            "objective": objective.name,
            **({"against": against} if against else {}),
            "dropped": dict(self.data.report.dropped),
            "cut": dict(self.data.report.cut),
        }
        found = pairs.compared(groups, own.metrics(groups, objective), other)
        return Result(f"pairs:{self.source}", found, notes)


class _Ifeval:
    generates = True

    def __init__(self, source: str | None, subject: _Subject):
        self.source, self.subject = source, subject
        self.punkt = ifeval.provide_punkt(subject.options.nltk_data)
        self.records = ifeval.read_instructions(source, subject.options.limit)

    def run(self) -> Result:
        prompts = [{"id": place, "prompt": each["prompt"]} for place, each in enumerate(self.records)]
        most = self.subject.options.max_new_tokens or 1280
        answers, notes = self.subject.answers("ifeval", prompts, 1, max_new_tokens=most, temperature=0.0)
        figures = ifeval.score(self.records, [text for (text,) in answers])
        counts = {
            "prompts": len(self.records),
            "instructions": sum(len(each["kwargs"]) for each in self.records),
        }
        return Result(
            f"ifeval:{self.source}" if self.source else "ifeval",
            figures,
            {**counts, "max new tokens": most, **notes},
        )


class _Diversity:
    generates = True

    def __init__(self, source: str | None, subject: _Subject):
        if not source:
            raise RecipeError(
                "--on diversity: which prompts? give diversity:FILE, a file of records with a prompt each"
            )
        from qorpo.generation.formats import format_of
        from qorpo.generation.prompts import read_prompts

        self.source, self.subject, options = source, subject, subject.options
        asked = read_prompts(source, format_of("jsonl"))[: options.limit]
        self.prompts = [{"id": place, "messages": list(each.messages)} for place, each in enumerate(asked)]
        if options.samples < 2 and len(asked) < 3:
            raise RecipeError(
                f"--on diversity: {len(asked)} prompts and --samples {options.samples} make no pairs; give more"
            )
        self.encoder = diversity.load_encoder(options.encoder, computing_device())

    def run(self) -> Result:
        options = self.subject.options
        how = {"samples": options.samples, "temperature": options.temperature, "seed": options.seed}
        answers, notes = self.subject.answers(
            "diversity", self.prompts, options.samples, max_new_tokens=options.max_new_tokens or 512, **how
        )
        figures = diversity.diversity(diversity.embed(self.encoder, answers))
        settings = {"prompts": len(answers), **how, "encoder": options.encoder, "measure": diversity.EQUATION}
        return Result(f"diversity:{self.source}", figures, {**settings, **notes})


class _Harness:
    generates = False

    def __init__(self, source: str | None, subject: _Subject):
        self.names = [name for name in (source or "").split(",") if name]
        if not self.names:
            raise RecipeError(
                "--on lm-eval: which tasks? give lm-eval:TASK,TASK, such as lm-eval:arc_challenge"
            )
        self.subject = subject
        self.tasks = harness.load_tasks(self.names, subject.options.task_folder)

    def run(self) -> Result:
        options, tokenizer = self.subject.options, self.subject.opened.chat.tokenizer
        figures = harness.run_tasks(
            self.subject.model, tokenizer, self.tasks, limit=options.limit, batch_size=options.batch_size
        )
        notes = {"chat template": bool(tokenizer.chat_template), "limit": options.limit}
        return Result(
            f"lm-eval:{','.join(self.names)}", figures, {k: v for k, v in notes.items() if v is not None}
        )


KINDS = {"pairs": _Pairs, "ifeval": _Ifeval, "diversity": _Diversity, "lm-eval": _Harness}


def _job(asked: str, subject: _Subject) -> Any:
    kind, _, source = asked.partition(":")
    if kind not in KINDS:
        raise RecipeError(
            f"--on {asked}: expected pairs:FILE, ifeval, ifeval:FILE, lm-eval:TASK,… or diversity:FILE"
        )
    if kind == "pairs" and not source:
        raise RecipeError("--on pairs: which pairs? give pairs:FILE")
    return KINDS[kind](source or None, subject)  # type: ignore[arg-type]
