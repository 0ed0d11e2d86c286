"""``python bench/overcommit.py``: steps a second with and without sharing and huge pages.

The same random steps of two guests, and of a host that swaps, migrates and logs, are run under each
design on hypervisors in turn. On all but the first the host also scans for equal pages once in so
many steps, and splits a huge page and makes it huge again once in four times as many. Printed are
medians of the rates, by processor time.
"""

import statistics
import time
from random import Random

from vapama.impl.vmm import Vmm
from vapama.spec import overcommit
from vapama.spec.machine import Machine
from vapama.spec.steps import EPT, NPT, SHADOW, Collapse, Scan, SetSlot, Split, Step, Unmerge

ROUNDS, PROGRAMS, LENGTH = 7, 12, 400
INTERVALS = (0, 128, 64, 32)
"""Steps from scan to scan; 0 for none."""
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


def timed(steps: list[Step], design: str, interval: int) -> float:
    """The seconds of a processor that a program takes, and all that the host does meanwhile."""
    hypervisor = Vmm(overcommit.plan(0x8864, design))
    start = time.process_time()
    for number, step in enumerate(steps):
        hypervisor.do(step)
        if interval and number % interval == 0:
            hypervisor.do(Scan())
        if interval and number % (4 * interval) == 4 * interval - 1:
            guest = number // interval >> 2 & 1
            hypervisor.do(Split(guest, overcommit.BLOCK))
            hypervisor.do(Collapse(guest, overcommit.BLOCK))
    return time.process_time() - start


def main() -> None:
    """Print the rates, and what part of the rate without they are."""
    print("steps a second, and a scan every so many steps:")
    for design in (SHADOW, EPT, NPT):
        programs = [program(seed, design) for seed in range(PROGRAMS)]
        times: dict[int, list[float]] = {interval: [] for interval in INTERVALS}
        for number in range(ROUNDS + 1):
            for interval in INTERVALS:
                spent = sum(timed(steps, design, interval) for steps in programs)
                if number:  # the first round compiles what a scan runs
                    times[interval].append(spent)
        rates = {i: PROGRAMS * LENGTH / statistics.median(times[i]) for i in INTERVALS}
        told = [f"{i}: {rates[i]:,.0f} ({rates[i] / rates[0]:.2f})" for i in INTERVALS[1:]]
        print(f"{design:<7} none: {rates[0]:,.0f}   {'   '.join(told)}")


if __name__ == "__main__":
    main()
