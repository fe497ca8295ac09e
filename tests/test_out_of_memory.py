"""What counts as running out of memory: each library's own words, and nothing that only sounds like it."""

import pytest
from helpers.shortages import OTHERS, SHORTAGES

from qorpo.errors import RunError
from qorpo.out_of_memory import advised, is_out_of_memory, shortage_of


@pytest.mark.parametrize("kind", SHORTAGES)
def test_what_says_that_memory_ran_out_is_recognised(kind):
    assert is_out_of_memory(SHORTAGES[kind]())


@pytest.mark.parametrize("kind", OTHERS)
def test_what_only_sounds_like_it_is_not(kind):
    assert not is_out_of_memory(OTHERS[kind]())


def test_an_error_that_has_its_advice_is_none_any_more():
    with pytest.raises(RunError, match="out of memory") as caught, advised("close something"):
        raise SHORTAGES["CUDA's runtime"]()
    assert "close something" in str(caught.value)
    assert not is_out_of_memory(caught.value)
    with pytest.raises(RunError) as again, advised("close something else"):
        raise caught.value
    assert again.value is caught.value


def test_other_errors_go_on_as_they_are():
    with pytest.raises(OSError, match="No space left"), advised("close something"):
        raise OTHERS["a full disk"]()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("CUDA's runtime", "CUDA error: out of memory"),
        ("NCCL", "Cuda failure 2 'out of memory'"),
        ("one that it was raised from", "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("host memory, by Python", "MemoryError"),
    ],
)
def test_the_line_that_says_so_is_what_is_told(kind, line):
    assert shortage_of(SHORTAGES[kind]()).startswith(line)


def test_errors_that_name_each_other_as_causes_end():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
