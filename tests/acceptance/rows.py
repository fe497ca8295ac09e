"""What the whole of qorpo is run on. A capability counts once it has a row here; see .github/CONTRIBUTING.md."""

from dataclasses import replace
from typing import Any

import pytest
from chain import FILES, SHARED, Row

EVERY_REASON = FILES / "every_reason.jsonl"  # each record says in "why" what becomes of it
STRICT = {"path": "demo", "chat_template": FILES / "strict.jinja"}

# What data.on_bad_record: skip leaves out of EVERY_REASON, and stops at otherwise.
UNREADABLE = {
    "not_json": 1,
    "not_utf8": 2,
    "not_object": 1,
    "missing_column": 1,
    "no_rejected": 1,
    "unpaired": 1,
    "wrong_type": 1,
    "wrong_value": 1,
    "wrong_length": 1,
    "unknown_role": 1,
    "not_text": 1,
}
NO_PAIR = {
    "tie": 3,
    "no_verdict": 1,
    "one_answer": 1,
    "further_vote": 1,
    "same": 1,
    "empty": 1,
    "empty_prompt": 1,
    "different_prompts": 1,
    "no_response": 1,
    "consecutive_assistant_turns": 1,
}
WORTH_A_LOOK = {
    "duplicate": 1,
    "contradiction": 1,
    "role_label_in_response": 1,
    "replacement_character": 1,
    "nul_character": 1,
    "tools_left_out": 1,
}

COMMITTED = [
    Row(
        "every reason",
        EVERY_REASON,
        model=STRICT,
        data={"on_bad_record": "skip", "min_margin": 0.5},
        dropped=UNREADABLE
        | NO_PAIR
        | {
            "small_margin": 4,
            "prompt_too_long": 1,
            "same_after_cut": 1,
            "template_refused": 1,
            "template_mismatch": 1,
            "special_token_in_response": 1,
        },
        noted=WORTH_A_LOOK,
        cut={"chosen": 1, "rejected": 1},
    ),
    Row(
        "every reason, other rules",
        EVERY_REASON,
        data={"on_bad_record": "skip", "long_prompts": "keep_end", "long_responses": "drop"},
        dropped=UNREADABLE | NO_PAIR | {"response_too_long": 3},
        noted=WORTH_A_LOOK | {"scores_disagree": 1},
        cut={"prompt": 1},
    ),
    Row(
        "several sources",
        [
            {"path": FILES / "table.csv", "weight": 0.5},
            {"path": FILES / "scored.json", "weight": 2},
            f"{FILES / 'dataset_info.json'}:opposites",
        ],
        FILES / "held_out.jsonl.gz",
        data={"on_bad_record": "skip", "ranked_pairs": "all"},
        dropped={
            "left_out_by_weight": 3,
            "not_csv": 1,
            "not_utf8": 1,
            "empty": 1,
            "tie": 8,
            "prompt_too_long": 1,
        },
        leaked=2,
    ),
    Row(
        "rows of one answer, dialogues and pairs",
        FILES / "dialogues.jsonl",
        objective={"name": "sft"},
        data={"on_bad_record": "skip"},
        dropped={
            "no_response": 1,
            "empty_prompt": 1,
            "empty": 1,
            "consecutive_assistant_turns": 1,
            "same": 1,
            "prompt_too_long": 1,
            "missing_column": 1,
        },
        cut={"response": 1},
    ),
    Row(
        "labelled answers and pairs, kto",
        FILES / "labelled.jsonl",
        objective={"name": "kto"},
        data={"on_bad_record": "skip"},
        dropped={"no_verdict": 1, "wrong_value": 1, "missing_column": 1, "empty": 1, "same": 1},
        noted={"contradiction": 1},
    ),
]
DEMO = Row("demo", "demo", "demo:eval")
COMMITTED += [
    replace(
        DEMO, name="DoRA scaled as rsLoRA, LoRA+", lora={"use_dora": True, "use_rslora": True, "init": "gaussian"},
        changes={"lora_plus_ratio": 4, "learning_rate": 3e-4},
    ),
    replace(DEMO, name="dpo", objective={"name": "dpo"}, full_learning_rate=3e-4),
    replace(DEMO, name="orthogonal, groups per step", lora={"init": "orthogonal"}, changes={"pairs_per_step": None, "groups_per_step": 8}),
]  # fmt: skip

ALPACA_EVAL = SHARED / "data" / "alpaca_eval"
LLAMA_FACTORY = SHARED / "data" / "llama_factory"


def shared_row(train: object, eval: float, **counts: Any) -> Row:
    name = "/".join(str(train).split("/")[-2:])
    limits = {"max_length": 96, "max_prompt_length": 48}
    return Row(name, train, eval, limits, model={"path": SHARED / "base"}, full_learning_rate=1e-4, **counts)


ON_SHARED = [
    shared_row(
        ALPACA_EVAL / "pairs.train.jsonl",
        0.02,
        dropped={"prompt_too_long": 601},
        noted={"role_label_in_response": 1, "contradiction": 1004},
        cut={"chosen": 1286, "rejected": 1000},
    ),
    shared_row(
        ALPACA_EVAL / "pairs.eval.jsonl",
        0.1,
        dropped={"prompt_too_long": 73},
        noted={"contradiction": 105},
        cut={"chosen": 135, "rejected": 95},
    ),
    shared_row(
        ALPACA_EVAL / "annotations.alpaca-7b.json",
        0.05,
        dropped={"tie": 16, "prompt_too_long": 221},
        cut={"chosen": 402, "rejected": 319},
    ),
    shared_row(
        ALPACA_EVAL / "annotations.vicuna-13b.json",
        0.05,
        dropped={"tie": 2, "prompt_too_long": 226},
        cut={"chosen": 496, "rejected": 395},
    ),
    *(
        shared_row(
            train,
            0.2,
            dropped={"prompt_too_long": 243},
            noted={"duplicate": 5},
            cut={"chosen": 44, "rejected": 50},
        )
        for train in (
            LLAMA_FACTORY / "dpo_en_demo.json",
            f"{LLAMA_FACTORY / 'dataset_info.json'}:dpo_en_demo",
        )
    ),
    shared_row(
        SHARED / "data" / "hh_format" / "sample.jsonl.gz",
        0.1,
        dropped={
            "empty": 2,
            "same": 1,
            "different_prompts": 1,
            "consecutive_assistant_turns": 1,
            "prompt_too_long": 154,
        },
        noted={"role_label_in_response": 1, "duplicate": 3, "contradiction": 18},
        cut={"chosen": 133, "rejected": 110},
    ),
]

ON_SHARED += [
    replace(
        shared_row(
            LLAMA_FACTORY / "identity.json", 0.2, dropped={"prompt_too_long": 5}, cut={"response": 68}
        ),
        objective={"name": "sft"},
    )
]

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
# Training that goes on from the adapter of SFT.
AFTER_SFT = [
    replace(DEMO, name="orpo after sft", changes={"learning_rate": 1e-3}),
    replace(DEMO, name="dpo after sft", objective={"name": "dpo"}, changes={"learning_rate": 1e-3}),
]
# What LoRA itself offers means nothing under --full, and is no row that each change must pass.
ROWS = [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * bool(row.lora)) for row in COMMITTED]
ROWS += [pytest.param(row, id=row.name, marks=needs_shared) for row in ON_SHARED]
ROWS_FOR_FULL = [row for row in ROWS if not row.values[0].lora]
