"""Files of prompts answered: as transformers does one by one, whatever the batch, through a kill, or refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qorpo
from qorpo.errors import DamageError, DataError, RecipeError, RunError
from qorpo.generation import generate as generating
from qorpo.generation.answers_file import part_of
from qorpo.model.load import keep_nf4_trainable


def one_by_one(model, tokenizer, questions, **options):
    """What a few lines of plain transformers answer."""
    answers = []
    for question in questions:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**asked, max_new_tokens=24, do_sample=False, **options)[
            0, asked["input_ids"].shape[1] :
        ]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers


def texts(made):
    return [answer.text for answer in made.answers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_models_batches_answer_as_transformers_one_by_one(merged, questions, dtype):
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)
    expected = one_by_one(plain, AutoTokenizer.from_pretrained(merged), questions)
    assert len(set(expected)) > 8
    batch_size = 5 if dtype == "float32" else 1  # in bfloat16 a batch's rounding may change near ties
    made = qorpo.generate(merged, questions, max_new_tokens=24, batch_size=batch_size, dtype=dtype)
    assert texts(made) == expected


def test_an_adapter_on_nf4_answers_as_transformers_and_peft_one_by_one(run, base, questions):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    # Loaded in bfloat16 the scales know the type that training dequantized to.
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=nf4)
    keep_nf4_trainable(plain)  # past a kernel of bitsandbytes' that is not the same arithmetic
    torch.nn.Module.float(plain)
    peft = PeftModel.from_pretrained(plain, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    questions = questions[:6]
    expected = one_by_one(peft, tokenizer, questions)
    assert len(set(expected)) > 4
    assert texts(qorpo.generate(run, questions, max_new_tokens=24, batch_size=4)) == expected


def test_samples_are_the_same_whatever_the_batch_and_other_with_another_seed(run, questions):
    loaded = qorpo.load(run)
    options = {"samples": 3, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": 12}
    made = [texts(qorpo.generate(loaded, questions, batch_size=size, **options)) for size in (64, 7)]
    assert made[0] == made[1]
    assert len(set(made[0])) > len(questions)
    # Without some of the prompts, the others are answered alike: an id is a place, unless it is given.
    assert texts(qorpo.generate(loaded, questions[:5], **options)) == made[0][:15]
    assert texts(qorpo.generate(loaded, questions, seed=1, **options)) != made[0]


# --- kept through a kill ---

OPTIONS = {"max_new_tokens": 12, "batch_size": 3, "temperature": 0.8, "samples": 2}


def interrupted(model, prompts, output, after, **options):
    """A run that ends after so many batches, as Ctrl-C would end it."""
    calls = iter(range(after + 1))

    def progress(done, total, tokens):
        if next(calls, None) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qorpo.generate(model, prompts, output, progress=progress, **OPTIONS | options)


@pytest.fixture
def prompts(tmp_path, questions):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"q{place}", "prompt": text}) + "\n" for place, text in enumerate(questions)
        )
    )
    return path


@pytest.mark.parametrize("torn", ["", '{"id": "q3", "sam', '{"id": 1}'])
def test_stopped_and_gone_on_with_it_is_the_same_file(run, prompts, tmp_path, torn):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    qorpo.generate(run, prompts, whole, **OPTIONS)
    interrupted(run, prompts, output, 3)
    assert not output.exists()
    kept = part_of(output).read_text()
    assert kept.count("\n") == 1 + 9
    part_of(output).write_text(kept + torn)  # a kill in the middle of a line
    made = qorpo.generate(run, prompts, output, **OPTIONS)
    assert output.read_bytes() == whole.read_bytes()
    assert not part_of(output).exists()
    assert made.tokens > 0
    assert sum(len(answer.turns) for answer in made.answers) == 24


def test_a_batch_that_was_kept_in_part_is_completed(run, prompts, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    qorpo.generate(run, prompts, whole, **OPTIONS)
    interrupted(run, prompts, output, 3)
    lines = part_of(output).read_text().splitlines(keepends=True)
    part_of(output).write_text("".join(lines[:-2]))
    qorpo.generate(run, prompts, output, **OPTIONS)
    assert output.read_bytes() == whole.read_bytes()


def test_all_answers_kept_need_no_model(run, prompts, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generating, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        qorpo.generate(run, prompts, output, **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr(generating, "TransformersEngine", None)
    qorpo.generate(run, prompts, output, **OPTIONS)
    assert len(output.read_text().splitlines()) == 24


def test_answers_made_with_something_else_are_refused(run, merged, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    interrupted(run, prompts, output, 2)
    kept = part_of(output).read_bytes()
    others = {
        "seed": {"seed": 1}, "temperature": {"temperature": 0.7}, "samples": {"samples": 3},
        "max_new_tokens": {"max_new_tokens": 13}, "format": {"format": "ifeval", "samples": 1},
        "model": {"quantization": "none"},
    }  # fmt: skip
    for name, options in others.items():
        with pytest.raises(RunError, match=f"made with something else(.|\n)*{name}"):
            qorpo.generate(run, prompts, output, **OPTIONS | options)
    with pytest.raises(RunError, match="model"):
        qorpo.generate(merged, prompts, output, **OPTIONS)
    prompts.write_text(prompts.read_text().replace("sky", "skies"))
    with pytest.raises(RunError, match="prompts"):
        qorpo.generate(run, prompts, output, **OPTIONS)
    assert part_of(output).read_bytes() == kept


def test_what_is_there_is_not_overwritten(run, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text("mine")
    with pytest.raises(RunError, match="something is there already"):
        qorpo.generate(run, prompts, output)
    assert output.read_text() == "mine"


def test_a_damaged_file_of_answers_is_named(run, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    interrupted(run, prompts, output, 2)
    lines = part_of(output).read_text().splitlines(keepends=True)
    part_of(output).write_text("".join([lines[0], "}{\n", *lines[1:]]))
    with pytest.raises(DamageError, match=r"answers\.jsonl\.part: is damaged"):
        qorpo.generate(run, prompts, output, **OPTIONS)


def test_one_process_writes_an_output(run, prompts, tmp_path):
    from qorpo.storage import owned_file

    output = tmp_path / "answers.jsonl"
    interrupted(run, prompts, output, 1)
    with owned_file(part_of(output)), pytest.raises(RunError, match="another process is writing it"):
        qorpo.generate(run, prompts, output, **OPTIONS)


def test_a_full_disk_is_one_message_and_loses_nothing(run, prompts, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    interrupted(run, prompts, output, 2)
    before = part_of(output).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*answers in .*\.part are kept"):
        qorpo.generate(run, prompts, output, **OPTIONS)
    monkeypatch.undo()
    assert part_of(output).read_bytes().startswith(before)
    qorpo.generate(run, prompts, output, **OPTIONS)
    assert len(output.read_text().splitlines()) == 24


# --- prompts ---


def test_records_messages_and_systems_are_understood(run):
    asked = [
        {"id": "a", "prompt": "Hello?"},
        {
            "id": "b",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
        },
        [{"role": "user", "content": "Hello?"}],
        {"instruction": "Translate.", "input": "Hello?"},
        "Hello?",
    ]
    made = qorpo.generate(run, asked, max_new_tokens=6)
    assert [answer.prompt.id for answer in made.answers] == ["a", "b", 2, 3, 4]
    assert made.answers[1].prompt.messages[0]["role"] == "system"
    assert made.answers[3].prompt.messages[-1]["content"] == "Translate.\nHello?"
    assert made.answers[0].text == made.answers[2].text == made.answers[4].text


BAD = {
    "not_json": (b'{"prompt": \n', "p.jsonl:2: not JSON"),
    "not_utf8": (b'{"prompt": "\xff"}\n', "p.jsonl:2: byte 0xff is not UTF-8"),
    "empty": (b'{"prompt": " "}\n', "p.jsonl:2: the prompt is empty"),
    "no prompt": (b'{"text": "a"}\n', "p.jsonl:2: no prompt in the columns 'text'"),
    "a list": (b"[1]\n", "p.jsonl:2: a list"),
    "twice": (b'{"id": 0, "prompt": "b"}\n', "p.jsonl:2: id 0 is p.jsonl:1's too"),
    "id": (b'{"id": [1], "prompt": "b"}\n', "p.jsonl:2: the id is a list"),
    "answered": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        "p.jsonl:2: the last turn is the assistant's",
    ),
    "too long": (json.dumps({"prompt": "long " * 300}).encode() + b"\n", "p.jsonl:2: the prompt has .* the model reads 256"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_prompts_are_named_before_the_model_is_loaded(run, tmp_path, monkeypatch, name):
    line, named = BAD[name]
    monkeypatch.setattr(generating, "TransformersEngine", None)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": 0, "prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=named):
        qorpo.generate(run, path, tmp_path / "answers.jsonl")
    assert [each.name for each in tmp_path.iterdir()] == ["p.jsonl"]


def test_all_bad_prompts_come_in_one_message(run, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": ""}\n' * 7)
    with pytest.raises(DataError, match=r"(?s)p.jsonl:1.*p.jsonl:5.*and 2 more"):
        qorpo.generate(run, path, tmp_path / "answers.jsonl")


def test_a_file_without_prompts_and_no_file_are_refused(run, tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match=r"p\.jsonl: holds no prompt"):
        qorpo.generate(run, tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="there is no file"):
        qorpo.generate(run, tmp_path / "q.jsonl")


def test_an_answer_stays_within_the_context(run):
    made = qorpo.generate(run, ["What? " * 40, "What?"], max_new_tokens=300)
    assert len(made.answers) == 2  # 256 positions; the rows would run past them together


REFUSED = {
    "format": ({"format": "mtbench"}, "--format: got 'mtbench'; expected jsonl, alpaca_eval"),
    "engine": ({"engine": "sglang"}, "--engine: got 'sglang'"),
    "samples": ({"samples": 0}, "--samples: got 0"),
    "greedy samples": ({"samples": 2}, "--samples: 2 answers without a temperature"),
    "one answer": ({"samples": 2, "format": "ifeval"}, "--samples: ifeval takes one answer"),
    "temperature": ({"temperature": -1.0}, "--temperature: got -1.0"),
    "top_p": ({"top_p": 0.0}, "--top-p: got 0.0"),
    "length": ({"max_new_tokens": 0}, "--max-new-tokens: got 0"),
    "suffix": ({"format": "alpaca_eval"}, r"ending in \.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_hold_are_refused(run, prompts, tmp_path, name):
    options, named = REFUSED[name]
    with pytest.raises(RecipeError, match=named):
        qorpo.generate(run, prompts, tmp_path / "answers.jsonl", **options)


def test_a_model_in_memory_keeps_no_answers_in_a_file(run, tmp_path):
    with pytest.raises(RecipeError, match="by its path"):
        qorpo.generate(qorpo.load(run), ["Hello?"], tmp_path / "answers.jsonl")


# --- the command ---


def test_the_command_answers_and_says_what_comes_next(command, run, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    code, out, err = command("generate", run, "--prompts", prompts, "--output", output, "--max-new-tokens", 6)
    assert code == 0
    assert f"answers: {output}" in out
    assert "answered 12/12" in err
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [
        f"q{n}" for n in range(12)
    ]
    code, out, err = command("generate", run, "--prompts", prompts, "--output", output)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    code, _, err = command(
        "generate", tmp_path / "none", "--prompts", prompts, "--output", tmp_path / "b.jsonl"
    )
    assert code == 2
    assert "there is no folder" in err
