"""What a card can't do: paged optimizer states under WSL2 and Windows, bfloat16 before sm_80."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import changed

from qorpo.engine import device
from qorpo.errors import ModelError
from qorpo.recipe import load_recipe

CARD, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def unsaid():
    device._say_once.cache_clear()


class Driver:
    """libcuda, of which only the answers count."""

    def __init__(self, monkeypatch, *, pages: int, init: int = 0):
        self.asked = []
        self.pages, self.init = pages, init
        monkeypatch.setattr(device.ctypes, "CDLL", lambda name: self)

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDeviceGet(self, card, index):  # noqa: N802
        card._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value, attribute, card):  # noqa: N802
        self.asked.append((attribute, card.value))
        value._obj.value = self.pages
        return 0


def no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(device.ctypes, "CDLL", missing)


def optimizer_of(recipe_dict, on=CARD, **changes):
    return device.resolve_on(load_recipe(changed(recipe_dict, **changes)), on).train.optimizer


def test_where_memory_does_not_move_auto_takes_torchs_optimizer_and_says_why(
    recipe_dict, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "qorpo")
    driver = Driver(monkeypatch, pages=0)
    monkeypatch.setattr(device.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert optimizer_of(recipe_dict) == "adamw_torch_fused"
    assert optimizer_of(recipe_dict, torch.device("cuda:1")) == "adamw_torch_fused"
    assert driver.asked == [(89, 0), (89, 1)]
    (line,) = caplog.messages
    assert line == (
        "optimizer: adamw_torch_fused, since under WSL2 no memory moves by itself between card and host "
        "(concurrentManagedAccess is 0)"
    )


def test_where_it_moves_or_there_is_no_card_states_are_paged_as_ever(recipe_dict, monkeypatch, caplog):
    Driver(monkeypatch, pages=1)
    assert optimizer_of(recipe_dict) == "paged_adamw_8bit"
    Driver(monkeypatch, pages=0)
    assert optimizer_of(recipe_dict, CPU) == "paged_adamw_8bit"
    assert not caplog.messages


def test_what_was_asked_for_is_taken_with_a_warning_once(recipe_dict, monkeypatch, caplog):
    Driver(monkeypatch, pages=0)
    for _ in range(2):
        assert optimizer_of(recipe_dict, train__optimizer="paged_adamw_32bit") == "paged_adamw_32bit"
    (line,) = caplog.messages
    assert line.startswith("optimizer: paged_adamw_32bit may fail, since under this driver")
    assert optimizer_of(recipe_dict, train__optimizer="adamw_8bit") == "adamw_8bit"


@pytest.mark.parametrize(
    ("system", "release", "optimizer"),
    [
        ("win32", "10", "adamw_torch_fused"),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", "adamw_torch_fused"),
        ("linux", "6.8.0-45-generic", "paged_adamw_8bit"),
    ],
)
def test_without_an_answer_of_the_driver_the_system_decides(
    recipe_dict, monkeypatch, system, release, optimizer
):
    no_driver(monkeypatch)
    monkeypatch.setattr(device.sys, "platform", system)
    monkeypatch.setattr(device.platform, "release", lambda: release)
    assert optimizer_of(recipe_dict) == optimizer
    Driver(monkeypatch, pages=1, init=100)  # CUDA_ERROR_NO_DEVICE
    assert optimizer_of(recipe_dict) == optimizer


# --- bfloat16 ---


def card(monkeypatch, name, major, minor):
    """A card by its name and version, as torch sees one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda which: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: name)


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA GeForce RTX 2080 Ti"])
def test_a_card_that_would_emulate_bfloat16_is_refused_by_name(monkeypatch, name):
    card(monkeypatch, name, 7, 5)
    with pytest.raises(ModelError, match=rf"{name} \(sm_75\) has no bfloat16"):
        device.check_bfloat16(CARD)


def test_others_are_not(monkeypatch):
    device.check_bfloat16(CPU)
    card(monkeypatch, "NVIDIA GeForce RTX 3090", 8, 6)
    device.check_bfloat16(CARD)


def test_a_run_is_refused_before_its_data_and_its_model_are_read(recipe_dict, monkeypatch, tmp_path):
    from qorpo.training import run

    card(monkeypatch, "Tesla T4", 7, 5)
    monkeypatch.setattr(run, "this_process", lambda: SimpleNamespace(device=CARD, is_main_process=True))
    monkeypatch.setattr(run, "load_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(ModelError, match="Tesla T4"):
        run.train(recipe_dict)
    assert not (tmp_path / "run").exists()


def test_merging_and_generating_compute_on_the_cpu_then(monkeypatch):
    card(monkeypatch, "Tesla T4", 7, 5)
    assert device.computing_device() == CPU
    card(monkeypatch, "NVIDIA A100", 8, 0)
    assert device.computing_device() == CARD
