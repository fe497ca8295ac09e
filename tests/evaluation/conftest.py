"""A run of eight steps on the tiny base, its merged model, and an encoder: what the evaluations are tried on."""

import shutil
from pathlib import Path

import pytest
from helpers.tiny import changed, preference_records, short_recipe, write_records


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    """20 pairs, two a prompt, with rows that are dropped or cut."""
    records = preference_records()[:10] + [
        record | {"chosen": record["chosen"] + " Indeed."} for record in preference_records()[:10]
    ]
    records += [
        {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."},
        {"prompt": "Empty?", "chosen": "", "rejected": "No."},
        {"prompt": "Long? " * 100, "chosen": "A", "rejected": "B"},
        {"prompt": "Cut?", "chosen": "word " * 200, "rejected": "No."},
    ]
    return write_records(tmp_path_factory.mktemp("held_out") / "pairs.jsonl", records)


@pytest.fixture(scope="session")
def trained(base, pairs_file, held_out, tmp_path_factory) -> Path:
    """The folder of a finished run; read it, copy it, don't change it."""
    from qorpo.training.run import train

    run = tmp_path_factory.mktemp("runs") / "run"
    recipe = short_recipe(base, pairs_file, run)
    train(changed(recipe, data__eval=str(held_out), train__learning_rate=0.01))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def merged(trained, tmp_path_factory) -> Path:
    from qorpo.merging.merge import merge

    return merge(
        trained, tmp_path_factory.mktemp("merged") / "merged", onto="dequantized", verify=False
    ).output


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, base) -> Path:
    """A sentence-transformers folder with a tiny model of its own."""
    library = pytest.importorskip("sentence_transformers", reason="the extra eval is not installed")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    words = Transformer(str(folder / "bert"))
    library.SentenceTransformer(modules=[words, Pooling(16)], device="cpu").save(str(folder / "whole"))
    return folder / "whole"
