"""How alike a model's answers are: the paper's Table 6. Legend: N prompts, K answers a prompt, D the embedding.

The paper's Eq. 11 is printed as half the sum of cosines over pairs, divided by N(N − 1): identical answers would be ¼
alike, while its Table 6 shows 0.8 to 0.9. What is reported here is the mean over pairs, 1 for identical answers.
Its embeddings are Gemini-Pro's: with others only the order of models can be compared.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qorpo.errors import ModelError
from qorpo.evaluation.extra import needed
from qorpo.evaluation.results import Figure
from qorpo.intervals import Interval, mean_interval

ENCODER = "sentence-transformers/all-mpnet-base-v2"
EQUATION = (
    "mean cosine over pairs of answers (Eq. 11 as printed would give a quarter of it for identical answers)"
)


def mean_cosine(embeddings_ND: ArrayLike) -> float:
    """The mean cosine similarity over all pairs of N ≥ 2 embeddings, none of them zero."""
    unit_ND = _unit(embeddings_ND)
    count = len(unit_ND)
    # ‖Σ e‖² holds every pair twice, and each embedding with itself.
    return float((np.square(unit_ND.sum(0)).sum() - count) / (count * (count - 1)))


def diversity(embeddings_NKD: ArrayLike) -> dict[str, Figure]:
    """Per input: the mean over prompts of `mean_cosine` among a prompt's answers (Eq. 12), where K ≥ 2.
    Across inputs: `mean_cosine` of each prompt's first answer (Eq. 13), where N ≥ 3.

    Intervals: a bootstrap over prompts; across inputs, where resampling would pair a prompt with its copy, the
    jackknife's standard error.
    """
    embeddings = np.asarray(embeddings_NKD, dtype=np.float64)
    prompts, samples, _ = embeddings.shape
    figures = {}
    if samples > 1:
        figures["per_input"] = Figure(mean_interval([mean_cosine(each_KD) for each_KD in embeddings]))
    if prompts > 2:
        figures["across_inputs"] = Figure(_jackknife(embeddings[:, 0]))
    return figures


def _jackknife(embeddings_ND: NDArray[np.float64]) -> Interval:
    unit_ND = _unit(embeddings_ND)
    count, whole = len(unit_ND), mean_cosine(unit_ND)
    without_N = np.square(unit_ND.sum(0) - unit_ND).sum(1) - (count - 1)
    without_N /= (count - 1) * (count - 2)
    error = math.sqrt((count - 1) / count * np.square(without_N - without_N.mean()).sum())
    return Interval(whole, whole - 1.96 * error, whole + 1.96 * error)


def _unit(embeddings_ND: ArrayLike) -> NDArray[np.float64]:
    embeddings = np.asarray(embeddings_ND, dtype=np.float64)
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def load_encoder(path: str, device: Any) -> Any:
    """A sentence-transformers model of a folder or hub id. Raises ModelError where it can't be had."""
    library = needed("sentence_transformers", "diversity")
    local = Path(path).expanduser()
    try:
        return library.SentenceTransformer(str(local) if local.is_dir() else path, device=str(device))
    except Exception as error:  # of whichever library underneath
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"--encoder {path}: can't be loaded ({lines[0]}); give the folder of a sentence-transformers model"
        ) from error


def embed(encoder: Any, answers: list[list[str]]) -> NDArray[np.float64]:
    """(N, K, D) of the answers to N prompts, K each."""
    flat = [text for texts in answers for text in texts]
    found = np.asarray(encoder.encode(flat, show_progress_bar=False), dtype=np.float64)
    return found.reshape(len(answers), -1, found.shape[-1])
