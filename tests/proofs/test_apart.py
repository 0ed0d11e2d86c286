"""Work in a process of its own gives its answer, and leaves nothing behind."""

import os

import pytest

from vapama.case import BadInput
from vapama.proofs.apart import apart

LEFT: list[int] = []


def leaves() -> int:
    LEFT.append(1)
    return len(LEFT)


def raises() -> None:
    raise BadInput("what, where, and what to do")


def dies() -> None:
    os._exit(7)


def test_its_answer_is_that_of_the_first_work_each_time() -> None:
    assert [apart(leaves), apart(leaves)] == [1, 1]
    assert LEFT == []


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(BadInput, match="what, where, and what to do"):
        apart(raises)


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(ChildProcessError, match="ended with 7"):
        apart(dies)


def test_no_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    apart(leaves)
    assert len(os.listdir("/proc/self/fd")) == before
