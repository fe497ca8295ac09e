"""What a run prints while it goes."""

import io

import pytest
from rich.console import Console

from qorpo.training.progress import ConsoleProgress

METRICS = {
    "loss": 12.34567, "rewards/accuracies": 0.5, "log_odds_ratio": -12.345, "learning_rate": 1e-5,
    "pairs_per_second": 12345.6, "chosen_logps": -10.123, "rejected_logps": -10.123, "nll": 10.12345,
}  # fmt: skip


@pytest.fixture
def told():
    file = io.StringIO()
    return ConsoleProgress(Console(file=file, width=60)), file


@pytest.mark.parametrize("total", [61, 10_000, 1_234_567])
def test_a_line_is_at_most_100_columns(told, total):
    progress, file = told
    progress.start(0, total)
    progress.logged(total, METRICS)
    progress.evaluated(total, {f"eval_{name}": value for name, value in METRICS.items()})
    progress.close()
    step, held_out = file.getvalue().splitlines()
    assert max(len(step), len(held_out)) <= 100
    assert step.startswith(
        f"step {total:,}/{total:,}  loss 12.3457  accuracy 0.500  log odds -12.345  lr 1.0e-05"
    )
    assert step.endswith("left 0:00:00")
    assert "held out: loss 12.3457  accuracy 0.500  log odds -12.345  chosen -10.123" in held_out


def test_metrics_that_an_objective_has_not_are_left_out(told):
    progress, file = told
    progress.start(0, 10)
    progress.evaluated(10, {"eval_loss": 1.0, "eval_nll": 1.0})
    progress.close()
    assert file.getvalue() == "step 10/10  held out: loss 1.0000  nll 1.0000\n"
