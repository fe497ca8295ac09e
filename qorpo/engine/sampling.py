"""Answers of a model to prompts in tokens: in batches of about one length, greedy or sampled by seed.

A request draws from random numbers of its own, so what it is answered does not depend on the batch it comes in. What
does is a product's last bit, which in bfloat16 is the third digit: two tokens that are so close may change places.
In float32 none was seen to.
Legend: R requests of a batch, V vocabulary.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qorpo.engine.within_memory import free_memory
from qorpo.errors import RunError
from qorpo.out_of_memory import is_out_of_memory, shortage_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
BATCH_TOKENS = 1 << 16  # prompts and answers, padding included: 8 GiB of keys and values of an 8B Llama


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered once; `temperature` 0 takes the likeliest token each time."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # of this request alone: see `seed_of`


class Completion(NamedTuple):
    """A model's answer in tokens, without the one it stopped at; `is_finished`: it stopped by itself."""

    ids: tuple[int, ...]
    is_finished: bool


Done = tuple[list[int], list[Completion]]
"""Places of requests, and their completions."""


def seed_of(*parts: object) -> int:
    """A request's seed: a hash of what tells it from others, such as a run's seed, the prompt's id and the sample."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def complete_all(
    model: Any,
    requests: Sequence[Request],
    *,
    stop_ids: Sequence[int],
    batch_size: int = BATCH_SIZE,
    is_done: Callable[[Sequence[int]], bool] = lambda places: False,
) -> Iterator[Done]:
    """Batch after batch, the longest prompts first; where memory runs out, the batch again in halves.

    Args:
        model: a causal language model of transformers, or PEFT's on one.
        stop_ids: each ends an answer.
        batch_size: the most requests at once.
        is_done: whether the batch of these requests may be left out. Batches are the same with and without it.

    Raises:
        RunError: where memory doesn't do for one request.
    """
    for places in batches(requests, batch_size, context_of(model)):
        if not is_done(places):
            yield from _within_memory(model, requests, places, stop_ids)


def _within_memory(
    model: Any, requests: Sequence[Request], places: list[int], stop_ids: Sequence[int]
) -> Iterator[Done]:
    try:
        done = complete(model, [requests[place] for place in places], stop_ids=stop_ids)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage = shortage_of(error)
    else:
        yield places, done
        return
    free_memory()  # out of the except clause, whose traceback holds the broken attempt's tensors
    if len(places) == 1:
        tokens = len(requests[places[0]].prompt_ids) + requests[places[0]].max_new_tokens
        raise RunError(
            f"out of memory ({shortage}) for one prompt and its answer of {tokens} tokens at most; lower "
            "max_new_tokens, or close what else needs memory"
        )
    middle = len(places) // 2
    logger.warning(
        "out of memory for %d answers at once (%s); the batch is done again in halves", len(places), shortage
    )
    for half in (places[:middle], places[middle:]):
        yield from _within_memory(model, requests, half, stop_ids)


def batches(requests: Sequence[Request], most: int, context: int | None) -> list[list[int]]:
    """Places of requests by length, the longest prompts first; none passes BATCH_TOKENS, nor any row the context."""
    by_length = sorted(range(len(requests)), key=lambda place: (-len(requests[place].prompt_ids), place))
    found: list[list[int]] = []
    width = new = 0
    for place in by_length:
        request = requests[place]
        new = max(new, request.max_new_tokens)
        fits = found and len(found[-1]) < most and (len(found[-1]) + 1) * (width + new) <= BATCH_TOKENS
        if fits and (context is None or width + new <= context):
            found[-1].append(place)
        else:
            found.append([place])
            width, new = len(request.prompt_ids), request.max_new_tokens
    return found


def context_of(model: Any) -> int | None:
    """The most tokens that a model reads; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def complete(
    model: Any, requests: Sequence[Request], *, stop_ids: Sequence[int], streamer: Any = None
) -> list[Completion]:
    """One batch, padded on the left, by transformers' `generate`; `streamer` is one of transformers', for one request."""
    width = max(len(request.prompt_ids) for request in requests)
    ids = torch.full((len(requests), width), stop_ids[0])
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        start = width - len(request.prompt_ids)
        ids[row, start:] = torch.tensor(request.prompt_ids)
        mask[row, start:] = 1
    new = max(request.max_new_tokens for request in requests)
    with _generation_config(model, stop_ids, new):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([_OwnDraws(requests, width, model.device)]),
            streamer=streamer,
        )
    return [
        _completion(row, request.max_new_tokens, stop_ids)
        for row, request in zip(output[:, width:].tolist(), requests, strict=True)
    ]


def _completion(ids: list[int], most: int, stop_ids: Sequence[int]) -> Completion:
    end = next((place for place, token in enumerate(ids[:most]) if token in stop_ids), None)
    return Completion(tuple(ids[:most] if end is None else ids[:end]), end is not None)


@contextmanager
def _generation_config(model: Any, stop_ids: Sequence[int], max_new_tokens: int) -> Iterator[None]:
    """Nothing but this: a model's own may hold penalties, which would count the padding too."""
    own, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig(
        eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], max_new_tokens=max_new_tokens, do_sample=False
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


class _OwnDraws(LogitsProcessor):
    """Lets one token through for each request that samples, drawn by the request's own uniform random numbers.

    The draw inverts the cumulative distribution in the vocabulary's order, after temperature, then top-p: the fewest
    tokens, the likeliest first, whose probabilities sum to top_p or more (arXiv 1904.09751, Sec. 3.1).
    """

    def __init__(self, requests: Sequence[Request], width: int, device: torch.device):
        self.width = width
        rows = [row for row, request in enumerate(requests) if request.temperature > 0]
        sampled = [requests[row] for row in rows]
        self.rows_R = torch.tensor(rows, dtype=torch.long, device=device)
        self.temperature_R1, self.top_p_R1 = (
            torch.tensor([getattr(each, name) for each in sampled], dtype=torch.float64, device=device)[
                :, None
            ]
            for name in ("temperature", "top_p")
        )
        self.generators = [torch.Generator().manual_seed(each.seed % 2**63) for each in sampled]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not len(self.rows_R):
            return scores
        draws = [torch.rand(1, generator=each, dtype=torch.float64) for each in self.generators]
        tokens_R1 = draw(
            scores[self.rows_R], torch.stack(draws).to(scores.device), self.temperature_R1, self.top_p_R1
        )
        chosen = torch.full_like(scores[self.rows_R], -torch.inf).scatter_(1, tokens_R1, 0.0)
        return scores.index_copy(0, self.rows_R, chosen)


def draw(
    logits_RV: torch.Tensor, uniform_R1: torch.Tensor, temperature_R1: torch.Tensor, top_p_R1: torch.Tensor
) -> torch.Tensor:
    """(R, 1) token ids, one for each uniform number in [0, 1)."""
    probs_RV = torch.softmax(logits_RV.double() / temperature_R1, dim=-1)
    if bool((top_p_R1 < 1).any()):
        ordered_RV, order_RV = probs_RV.sort(dim=-1, descending=True)
        before_RV = ordered_RV.cumsum(-1) - ordered_RV
        ordered_RV = ordered_RV.masked_fill(before_RV >= top_p_R1, 0.0)
        probs_RV = torch.zeros_like(probs_RV).scatter_(1, order_RV, ordered_RV)
    sums_RV = probs_RV.cumsum(-1)
    total_R1 = sums_RV[:, -1:]
    # Below the total also where the product rounds up: the token that is found then has a probability.
    point_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(sums_RV, point_R1, right=True)
