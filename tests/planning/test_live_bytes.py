"""The count of living bytes, on real tensors: every storage once, from when it is made to when it is freed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qorpo.model.offload import host_room
from qorpo.planning.live_bytes import BLOCK, LiveBytes

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def total(count: LiveBytes, stretch: str = "") -> float:
    return count.peaks[stretch].total_bytes / KIB


@pytest.mark.parametrize("fake", [False, True])
def test_the_peak_is_of_what_lives_at_once(fake):
    count = LiveBytes()
    with FakeTensorMode() if fake else torch.no_grad(), count:
        first = kib(10)
        second = kib(20)
        del first
        third = kib(5)
    assert total(count) == 30
    assert count.peaks[""].by_kind == {"activations": 30 * KIB}
    del second, third


def test_views_and_in_place_changes_are_no_new_bytes_and_keep_the_old_alive():
    with LiveBytes() as count:
        row = kib(10)
        part = row[: 2 * KIB].view(2, -1).t()
        part.add_(1)
        del row
        more = kib(1)
        assert total(count) == 11
        del part
        again = kib(10)
    assert total(count) == 11
    del more, again


def test_bytes_are_of_their_kind_until_told_otherwise():
    count, weights = LiveBytes(), kib(3)
    count.add([weights], "weights")
    with count:
        count.kind, count.stretch = "backward", "second"
        gradient = kib(4)
        count.add([gradient], "gradients")
        last = kib(1)
    assert count.peaks["second"].by_kind == {"weights": 3 * KIB, "gradients": 4 * KIB, "backward": KIB}
    assert "weights" in count.peaks[""].by_kind
    del last


def test_blocks_are_whole():
    with LiveBytes() as count:
        one = torch.empty(1)
    assert total(count) * KIB == BLOCK
    del one


def test_host_memory_is_not_the_devices():
    with LiveBytes() as count:
        device = kib(2)
        host = host_room(device)
        other = kib(1)
    assert total(count) == 3
    assert count.host_peak == 2 * KIB
    del host, other


def test_it_says_where():
    with LiveBytes() as count:
        here = kib(1)
    assert count.peaks[""].where.endswith(" kib")
    assert "planning/test_live_bytes.py:" in count.peaks[""].where
    del here
