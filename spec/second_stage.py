"""The second stage, whichever it is: EPT or nested page tables."""

from vapama.spec import ept, npt
from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.memory import Memory
from vapama.spec.outcomes import Outcome
from vapama.spec.stage import Ept, Stage


def translate(stage: Stage, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
    """The outcome of `access` by a fresh walk of the second stage's tables."""
    if isinstance(stage, Ept):
        return ept.translate(stage, memory, access)
    return npt.translate(stage, memory, access)
