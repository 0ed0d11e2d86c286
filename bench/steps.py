"""``python bench/steps.py``: steps a second of guests and host, each judged by the checker.

Random programs of 64 steps are run under each design, power-on included: without an audit of the
tables, with one after every sixteenth step, and with one after each. The three take turns; printed
are medians of the rates, by processor time.
"""

import statistics
import time
from random import Random

from vapama.impl.vmm import Vmm
from vapama.spec import programs, shadow
from vapama.spec.machine import Machine
from vapama.spec.steps import EPT, NPT, SHADOW

ROUNDS, PROGRAMS, LENGTH = 5, 30, 64
EVERY = (0, 16, 1)
"""Steps from audit to audit; 0 for none."""


def timed(seed: int, design: str, every: int) -> float:
    """The seconds of a processor that a program takes."""
    random = Random(seed)
    style = random.getrandbits(41)
    words = [random.getrandbits(64) for _ in range(LENGTH)]
    start = time.process_time()
    plan = programs.plan(style, design)
    hypervisor, machine = Vmm(plan), Machine(plan)
    for number, word in enumerate(words):
        step = programs.decode(word, machine, style)
        machine.check(step, hypervisor.do(step), hypervisor.word)
        if every and number % every == 0:
            for violation in shadow.audit(hypervisor.view()):
                raise violation
    return time.process_time() - start


def main() -> None:
    """Print the rates."""
    print("steps a second, with an audit after every so many:")
    for design in (SHADOW, EPT, NPT):
        times: dict[int, list[float]] = {every: [] for every in EVERY}
        for _ in range(ROUNDS):
            for every in EVERY:
                times[every].append(sum(timed(seed, design, every) for seed in range(PROGRAMS)))
        rates = {i: PROGRAMS * LENGTH / statistics.median(times[i]) for i in EVERY}
        told = [f"{every or 'none'}: {rate:,.0f}" for every, rate in rates.items()]
        print(f"{design:<7} {'   '.join(told)}")


if __name__ == "__main__":
    main()
