"""vLLM in transformers' place, where it is installed: the base as it was quantized, the adapter as a LoRA request.

Written to vLLM's signatures and tested with a stand-in that has them; not measured on a GPU yet.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qorpo.card import VLLM_RANKS
from qorpo.engine.sampling import Completion, Done, Request
from qorpo.errors import ModelError, RecipeError
from qorpo.generation.load import Opened

REQUESTS_AT_ONCE = 256  # vLLM batches by itself; so many are kept on disk together


def check_vllm() -> None:
    """Raises RecipeError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError("--engine vllm: vLLM is not installed; pip install vllm, or leave --engine out")


class VllmEngine:
    """vLLM's `LLM.generate` on a model that is not loaded yet.

    Raises:
        ModelError: for an adapter that vLLM can't put on a base.
    """

    def __init__(self, opened: Opened, context: int | None):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        options: dict[str, Any] = {"quantization": "bitsandbytes"} if opened.quantization == "nf4" else {}
        self.lora = None
        if opened.trained is not None:
            adapter = opened.trained.adapter
            if not adapter.is_plain or adapter.config.modules_to_save:
                raise ModelError(
                    f"{adapter.folder}: vLLM takes plain LoRA alone; merge it (qorpo merge), then give the merged folder"
                )
            ranks = [adapter.config.r, *adapter.config.rank_pattern.values()]
            options["enable_lora"] = True
            options["max_lora_rank"] = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), max(ranks))
            self.lora = LoRARequest("adapter", 1, str(adapter.folder))
        self.stop_ids = list({opened.chat.stop_token_id, opened.chat.tokenizer.eos_token_id} - {None})
        self.llm = LLM(
            model=opened.path, revision=opened.revision, trust_remote_code=opened.trust_remote_code,
            dtype="float32" if opened.dtype == "float32" else "bfloat16", max_model_len=context, **options,
        )  # fmt: skip

    def complete(
        self, requests: Sequence[Request], is_done: Callable[[Sequence[int]], bool]
    ) -> Iterator[Done]:
        from vllm import SamplingParams

        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            places = list(range(start, min(start + REQUESTS_AT_ONCE, len(requests))))
            if is_done(places):
                continue
            batch = [requests[place] for place in places]
            found = self.llm.generate(
                [{"prompt_token_ids": list(each.prompt_ids)} for each in batch],
                [
                    SamplingParams(
                        temperature=each.temperature, top_p=each.top_p, seed=each.seed % 2**63,
                        max_tokens=each.max_new_tokens, stop_token_ids=self.stop_ids,
                    )
                    for each in batch
                ],
                lora_request=self.lora,
                use_tqdm=False,
            )  # fmt: skip
            yield places, [self._completion(each.outputs[0]) for each in found]

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        if ids and ids[-1] in self.stop_ids:  # vLLM counts the stop token to the answer
            ids = ids[:-1]
        return Completion(ids, output.finish_reason == "stop")
