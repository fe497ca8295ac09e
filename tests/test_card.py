"""The README.md of an adapter, a model and a merged folder: filled, of one machine nothing, and none of PEFT's."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from helpers.tiny import changed, preference_records, short_recipe, write_records

import qorpo
from qorpo.card import licence, shown_base


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carded")
    records = [*preference_records(), {"prompt": "Why?", "chosen": "So.", "rejected": "So."}]
    pairs = write_records(folder / "pairs.jsonl", records)
    qorpo.train(changed(short_recipe(base, pairs, folder / "run"), data__eval=0.25, train__max_steps=4))
    return folder / "run"


def front_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_an_adapters_card_says_what_it_is_made_of_and_how_it_measured(run, base):
    card = (run / "adapter" / "README.md").read_text()
    assert front_of(card) == {"library_name": "peft", "tags": ["orpo", "qorpo", "lora"]}
    assert "# run\n" in card
    assert "- base: `base`" in card
    assert "licence of the base: not known" in card
    assert "split from data: read 41, dropped 1 same, kept 40" in card
    assert re.search(r"\| held out \| step 0 \| step \d, kept \|", card)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "eval_nll" in row]
    best = min(held_out, key=lambda row: row["eval_loss"])
    assert f"| eval_nll | {held_out[0]['eval_nll']:.4f} | {best['eval_nll']:.4f} |" in card
    assert "per_second" not in card
    assert "rank: 4" in card
    assert str(run.parent) not in card
    assert str(base.parent) not in card
    assert "[More Information Needed]" not in card
    assert "--max-lora-rank 8" in card


@pytest.mark.slow
def test_the_two_lines_of_the_card_work(run, base):
    card = (run / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"base"', f'"{base}"').replace("PATH", str(run / "adapter"))
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\nfrom peft import PeftModel\n"
    done = subprocess.run([sys.executable, "-c", imports + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checkpoints_carry_no_blank_card(run):
    assert not list((run / "checkpoints").rglob("README.md"))


def test_a_merged_models_card_says_the_same_of_its_run(run, tmp_path):
    qorpo.merge(run, tmp_path / "merged", verify=False)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert front_of(card)["library_name"] == "transformers"
    assert "dropped 1 same" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card


@pytest.mark.parametrize(
    "card", ["", "---\n", "---\n: [\n---\n", "---\nlicense: [1]\n---\n", "no front", "---\n3\n---\n"]
)
def test_a_base_that_names_no_licence_has_none(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert licence(str(tmp_path)) is None


def test_a_bases_licence_is_read_from_its_card(tmp_path):
    assert licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert licence(str(tmp_path)) == "apache-2.0"


def test_of_a_local_base_its_name_alone_is_shown(tmp_path):
    (tmp_path / "mine").mkdir()
    assert shown_base(str(tmp_path / "mine")) == "mine"
    assert shown_base("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"
