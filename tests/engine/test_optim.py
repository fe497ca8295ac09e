"""Optimizers and schedules: the names mean what they say, and states come back as they were."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from qorpo.engine.optim import load_optimizer_state, make_optimizer, make_schedule, take_rate
from qorpo.recipe import load_recipe

OPTIMIZERS = ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]


def settings(**keys):
    least = {"model": {"path": "demo"}, "data": {"train": "demo"}, "output": "runs/x"}
    keys = {"learning_rate": 0.01, "optimizer": "adamw_torch", **keys}
    return load_recipe({**least, "train": keys}).train


def parameters(device="cpu"):
    torch.manual_seed(0)
    # 8-bit states need 4096 elements; fewer stay in 32 bits.
    return [
        nn.Parameter(torch.randn(64, 80, device=device)),
        nn.Parameter(torch.randn(3, 5, device=device)),
        nn.Parameter(torch.randn(80, device=device)),
    ]


# --- optimizers ---


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_on_the_cpu_give_their_arithmetic_without_a_warning(name, recwarn):
    import bitsandbytes.optim as bnb

    classes = {
        "paged_adamw_8bit": bnb.AdamW8bit,  # nothing to page out to
        "paged_adamw_32bit": bnb.AdamW32bit,
        "adamw_8bit": bnb.AdamW8bit,
        "adamw_torch": torch.optim.AdamW,
        "adamw_torch_fused": torch.optim.AdamW,
    }
    weights = parameters()
    optimizer = make_optimizer(weights, settings(optimizer=name))
    assert type(optimizer) is classes[name]
    if name.startswith("adamw_torch"):
        assert bool(optimizer.defaults["fused"]) == (name == "adamw_torch_fused")
    step(optimizer, weights, 0)
    first_state = next(
        value for key, value in optimizer.state[weights[0]].items() if key in ("state1", "exp_avg")
    )
    assert first_state.dtype == (torch.uint8 if "8bit" in name else torch.float32)
    assert not recwarn.list


def test_paged_names_elsewhere_give_the_paged_classes():
    import bitsandbytes.optim as bnb

    for name, kind in (("paged_adamw_8bit", bnb.PagedAdamW8bit), ("paged_adamw_32bit", bnb.PagedAdamW32bit)):
        optimizer = make_optimizer(parameters("meta"), settings(optimizer=name))
        assert type(optimizer) is kind
        assert optimizer.is_paged


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_reach_the_optimizer_and_only_matrices_decay(name):
    weights = parameters()
    optimizer = make_optimizer(
        weights,
        settings(
            optimizer=name, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, learning_rate=0.02
        ),
    )  # fmt: skip
    decayed, plain = optimizer.param_groups
    assert [id(weight) for weight in decayed["params"]] == [id(weight) for weight in weights[:2]]
    assert [id(weight) for weight in plain["params"]] == [id(weights[2])]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.02
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["eps"] == 1e-6


def test_weight_decay_shrinks_matrices_alone():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = make_optimizer(weights, settings(weight_decay=0.5))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weights[0].detach(), before[0] * (1 - 0.01 * 0.5))
    assert torch.equal(weights[2], before[2])


def test_with_lora_plus_b_matrices_learn_at_so_many_times_the_rate():
    """A step of AdamW with constant gradients is the rate itself, whatever their size; decay goes with the rate."""
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    recipe = settings(lora_plus_ratio=16, schedule="linear", warmup_ratio=0.5, weight_decay=0.0)
    optimizer = make_optimizer(weights, recipe, b_matrices=weights[1:2])
    schedule = make_schedule(optimizer, recipe, 4)
    for rate in (0.005, 0.01, 0.01, 0.005):
        assert schedule.get_last_lr() == pytest.approx([rate, rate, 16 * rate])
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        schedule.step()
    for weight, start, ratio in zip(weights, before, (1, 16, 1), strict=True):
        torch.testing.assert_close((start - weight).detach(), torch.full_like(start, 0.03 * ratio))


def test_a_schedule_of_two_rates_goes_on_with_both():
    recipe = settings(lora_plus_ratio=16)
    schedules = []
    for _ in range(2):
        weights = parameters()
        schedules.append(make_schedule(make_optimizer(weights, recipe, weights[:1]), recipe, 20))
    for _ in range(7):
        schedules[0].optimizer.step()
        schedules[0].step()
    schedules[1].load_state_dict(copy.deepcopy(schedules[0].state_dict()))
    take_rate(schedules[1])
    rates = schedules[1].get_last_lr()
    assert rates == schedules[0].get_last_lr()
    assert rates[-1] == pytest.approx(16 * rates[0])


def test_b_matrices_of_another_recipe_learn_at_the_same_rate():
    weights = parameters()
    optimizer = make_optimizer(weights, settings(), b_matrices=weights[:1])
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def step(optimizer, weights, number):
    generator = torch.Generator().manual_seed(number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(name):
    weights = parameters()
    optimizer = make_optimizer(weights, settings(optimizer=name))
    for number in range(3):
        step(optimizer, weights, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    for number in range(3, 6):
        step(optimizer, weights, number)

    file.seek(0)
    resumed = make_optimizer(others, settings(optimizer=name))
    load_optimizer_state(resumed, torch.load(file, weights_only=True))
    for number in range(3, 6):
        step(resumed, others, number)
    for weight, other in zip(weights, others, strict=True):
        assert torch.equal(weight, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_states_are_paged_again_after_loading(name):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(512, 512, device="cuda"))]  # over 1e5 elements, or nothing is paged
    optimizer = make_optimizer(weights, settings(optimizer=name))

    def step(optimizer, weights, number):
        generator = torch.Generator("cuda").manual_seed(number)
        weights[0].grad = torch.randn(weights[0].shape, generator=generator, device="cuda")
        optimizer.step()

    step(optimizer, weights, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    others = [nn.Parameter(weights[0].detach().clone())]
    file.seek(0)
    resumed = make_optimizer(others, settings(optimizer=name))
    load_optimizer_state(resumed, torch.load(file, map_location="cpu", weights_only=True))
    assert all(resumed.state[others[0]][state].is_paged for state in ("state1", "state2"))
    for each, weight in ((optimizer, weights), (resumed, others)):
        step(each, weight, 1)
    assert torch.equal(weights[0], others[0])


# --- schedules ---


def rates(total_steps=40, **keys):
    """The learning rate of each step."""
    weight = nn.Parameter(torch.zeros(2, 2))
    recipe = settings(**keys)
    optimizer = make_optimizer([weight], recipe)
    schedule = make_schedule(optimizer, recipe, total_steps)
    found = []
    for _ in range(total_steps):
        found.append(schedule.get_last_lr()[0])
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        schedule.step()
    return found


SHAPES = {
    "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * (step - 10) / 30)),
    "linear": lambda step: (40 - step) / 30,
    "inverse_sqrt": lambda step: math.sqrt(10 / step),
    "constant": lambda step: 1.0,
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_the_rate_climbs_from_its_first_share_and_then_takes_its_course(schedule):
    found = rates(schedule=schedule, warmup_ratio=0.25)
    assert found[:10] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01])
    assert found[10:] == pytest.approx([0.01 * SHAPES[schedule](step) for step in range(10, 40)])
    assert max(found) == pytest.approx(0.01)
    assert min(found) > 0


def test_rates_by_hand():
    """Four steps, two of warm-up: 1/2 and 2/2, then the start and the middle of what is left."""
    assert rates(4, schedule="linear", warmup_ratio=0.5) == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert rates(4, schedule="cosine", warmup_ratio=0.5) == pytest.approx([0.005, 0.01, 0.01, 0.005])
    third = 0.01 * (1 + math.cos(math.pi / 3)) / 2
    assert rates(4, schedule="cosine", warmup_ratio=0.25) == pytest.approx([0.01, 0.01, third, 0.01 - third])


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("ratio", [0, 0.1, 0.99])
def test_a_single_step_has_the_full_rate(schedule, ratio):
    assert rates(1, schedule=schedule, warmup_ratio=ratio) == [pytest.approx(0.01)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert rates(schedule=schedule, warmup_ratio=0)[0] == pytest.approx(0.01)


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 4), (0.11, 5), (0.001, 1), (0.7, 28)])
def test_warm_up_is_rounded_up_to_whole_steps(ratio, steps):
    found = rates(schedule="constant", warmup_ratio=ratio)
    assert found.index(0.01) == steps - 1


def test_a_schedule_loaded_goes_on():
    recipe = settings(schedule="cosine", warmup_ratio=0.2)
    schedules = [make_schedule(make_optimizer(parameters(), recipe), recipe, 20) for _ in range(2)]
    for _ in range(7):
        schedules[0].optimizer.step()
        schedules[0].step()
    schedules[1].load_state_dict(copy.deepcopy(schedules[0].state_dict()))
    for schedule in schedules:
        schedule.optimizer.step()
        schedule.step()
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr() != [0.01]
