"""The vLLM engine, by a stand-in that has the signatures of vLLM's LLM, SamplingParams and LoRARequest."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

import qorpo
from qorpo.errors import RecipeError


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: list


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    model: str
    revision: str | None
    trust_remote_code: bool
    dtype: str
    max_model_len: int
    quantization: str | None = None
    enable_lora: bool = False
    max_lora_rank: int = 16
    asked: list = field(default_factory=list)
    made: ClassVar[list] = []

    def __post_init__(self):
        LLM.made.append(self)

    def generate(self, prompts, sampling_params, *, lora_request, use_tqdm):
        self.asked += list(zip(prompts, sampling_params, strict=True))
        self.lora = lora_request
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(token_ids=[20 + n, *params.stop_token_ids[:1]], finish_reason="stop")
                ]
            )
            for n, params in enumerate(sampling_params)
        ]


@pytest.fixture
def vllm(monkeypatch):
    import importlib.machinery

    package, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    for name, module in {
        "vllm": package,
        "vllm.lora": ModuleType("vllm.lora"),
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    LLM.made.clear()


def test_a_run_is_asked_as_its_quantized_base_with_the_adapter(vllm, run, base, tmp_path):
    options = {"engine": "vllm", "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9}
    made = qorpo.generate(run, ["Hello?", "Who?"], tmp_path / "answers.jsonl", **options)
    tokenizer = qorpo.load(run)[1]
    assert [answer.text for answer in made.answers] == [tokenizer.decode([20 + n]).strip() for n in (0, 1)]
    assert all(answer.is_finished for answer in made.answers)
    (llm,) = LLM.made
    assert (llm.model, llm.quantization, llm.enable_lora, llm.max_lora_rank) == (
        str(base),
        "bitsandbytes",
        True,
        8,
    )
    assert llm.max_model_len == 256
    assert llm.lora.lora_path == str(run / "adapter")
    prompt, params = llm.asked[0]
    assert (
        prompt["prompt_token_ids"]
        == tokenizer.apply_chat_template([{"role": "user", "content": "Hello?"}], add_generation_prompt=True)[
            "input_ids"
        ]
    )
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 9)
    assert params.stop_token_ids == [tokenizer.eos_token_id]
    assert 0 <= params.seed < 2**63
    assert params.seed != llm.asked[1][1].seed


def test_a_merged_model_is_asked_as_it_is(vllm, merged, tmp_path):
    qorpo.generate(merged, ["Hello?"], tmp_path / "answers.jsonl", engine="vllm")
    (llm,) = LLM.made
    assert (llm.model, llm.quantization, llm.enable_lora, llm.lora) == (str(merged), None, False, None)


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is here")
def test_without_vllm_one_line_says_so(run, tmp_path):
    with pytest.raises(RecipeError, match="vLLM is not installed; pip install vllm"):
        qorpo.generate(run, ["Hello?"], tmp_path / "answers.jsonl", engine="vllm")
    assert not list(tmp_path.iterdir())
