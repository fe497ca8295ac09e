"""What tests of whole runs share."""

import pytest
from helpers.tiny import changed, preference_records, write_records

from qorpo import Trainer, load_pairs
from qorpo.model.load import load_model, load_tokenizer
from qorpo.recipe import load_recipe


@pytest.fixture
def make_trainer(recipe_dict, base, tmp_path):
    """make_trainer(**changes of the recipe): 30 pairs to train on and 10 to evaluate on, a new output each time."""
    numbers = iter(range(100))

    def make(model=None, *, has_eval=True, path=base, **changes):
        recipe = load_recipe(changed(recipe_dict, output=str(tmp_path / f"run-{next(numbers)}"), **changes))
        records = preference_records()
        parts = [
            load_pairs(write_records(tmp_path / name, part))
            for name, part in (("train.jsonl", records[:30]), ("eval.jsonl", records[30:]))
        ]
        if model is None:
            quantization = recipe.model.quantization.replace("auto", "nf4")
            model = load_model(str(path), quantization=quantization)
        return Trainer(model, load_tokenizer(str(path)), recipe, parts[0], parts[1] if has_eval else None)

    return make
