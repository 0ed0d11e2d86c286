"""``python bench/overcommit.py``: steps a second with and without sharing and huge pages.

The same random steps of two guests, and of a host that swaps, migrates and logs, are run under each
design on two hypervisors in turn. On one the host also scans for equal pages, makes pages huge and
splits them, each after every so many steps. Printed are medians of the rates of the guests' steps.
"""

import statistics
import time
from random import Random

from vapama.impl.vmm import Vmm
from vapama.spec import overcommit
from vapama.spec.machine import Machine
from vapama.spec.steps import EPT, NPT, SHADOW, Collapse, Scan, SetSlot, Split, Step, Unmerge

ROUNDS, PROGRAMS, LENGTH = 7, 12, 400
SCAN_EVERY, HUGE_EVERY = 32, 100
SAVES = (Scan, Unmerge, Collapse, Split)


def program(seed: int, design: str) -> list[Step]:
    """Random steps that save no memory."""
    random, machine = Random(seed), Machine(overcommit.plan(0x8864, design))
    steps: list[Step] = []
    while len(steps) < LENGTH:
        step = overcommit.decode(random.getrandbits(64), machine, 0x8864)
        if not isinstance(step, (*SAVES, SetSlot)):
            steps.append(step)
    return steps


def timed(steps: list[Step], design: str, saving: bool) -> float:
    """The seconds that a program takes, and all that the host does meanwhile."""
    hypervisor = Vmm(overcommit.plan(0x8864, design))
    start = time.perf_counter()
    for number, step in enumerate(steps):
        hypervisor.do(step)
        if saving and number % SCAN_EVERY == 0:
            hypervisor.do(Scan())
        if saving and number % HUGE_EVERY == HUGE_EVERY - 1:
            guest = number // HUGE_EVERY & 1
            hypervisor.do(Split(guest, overcommit.BLOCK))
            hypervisor.do(Collapse(guest, overcommit.BLOCK))
    return time.perf_counter() - start


def main() -> None:
    """Print the rates, and their ratio."""
    print(f"{'':<8} {'without':>12} {'with':>12} {'ratio':>7}   (steps a second)")
    for design in (SHADOW, EPT, NPT):
        programs = [program(seed, design) for seed in range(PROGRAMS)]
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(ROUNDS + 1):
            for saving in (False, True):
                spent = sum(timed(steps, design, saving) for steps in programs)
                if number:  # the first round compiles what a scan runs
                    times[saving].append(spent)
        off, on = (PROGRAMS * LENGTH / statistics.median(times[saving]) for saving in (False, True))
        print(f"{design:<8} {off:>12,.0f} {on:>12,.0f} {on / off:>7.2f}")


if __name__ == "__main__":
    main()
