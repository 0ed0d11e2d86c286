"""A proof in a process of its own, so that it finds all as if it were the first.

How z3 goes about a query depends on the terms that its process has made before, by proofs that have
nothing to do with it: one came to its limit of steps after some proofs, and not after others.
"""

import os
import pickle
import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What `work` returns or raises, in a copy of this process that ends with it.

    Raises `ChildProcessError` if that ended without an answer.
    """
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # Other threads are not copied, and no proof waits for one.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _answer(work, sender)
    os.close(sender)
    with open(receiver, "rb") as answers:
        told = answers.read()
    _, status = os.waitpid(child, 0)
    if not told:
        raise ChildProcessError(f"its process ended with {os.waitstatus_to_exitcode(status)}")
    answer, error = pickle.loads(told)
    if error is not None:
        raise error
    returned: T = answer
    return returned


def _answer(work: Callable[[], object], sender: int) -> None:
    """Tell what came of the work, and end."""
    status = 1
    try:
        try:
            told: tuple[object, BaseException | None] = work(), None
        except BaseException as error:
            told = None, error
        with open(sender, "wb") as answers:
            pickle.dump(told, answers)
        status = 0
    finally:
        os._exit(status)
