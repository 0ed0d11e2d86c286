"""Invariants of the 64-bit walk: accessed and dirty flags, and the bits that mean nothing."""

from typing import Any

from vapama.spec.domains import ANY
from vapama.spec.memory import Altered, Marked
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import PageFault, Translated, kind
from vapama.spec.paging import (
    ACCESSED,
    CACHE_DISABLE,
    DIRTY,
    GLOBAL,
    WRITE_THROUGH,
    path,
    translate,
)
from vapama.spec.subject import ERROR_CODE, LEVEL, PA, UPDATES
from vapama.spec.words import low_bits

IGNORED = WRITE_THROUGH | CACHE_DISABLE | ACCESSED | DIRTY | GLOBAL | 0x7 << 9 | 0x7F << 52
"""Bits of any entry that decide neither where an access goes nor whether it may: PWT, PCD, A, D, G
and the bits that are free for software, 11:9 and 58:52."""
KEY = 0xF << 59
"""The protection key, ignored too while keys are off."""


@invariant(
    source="Intel SDM Vol. 3A, 4.8",
    reaches=("write", "no write"),
    needs=(UPDATES,),
    twin="reads-set-dirty",
)
def a_translation_marks_each_entry_it_used(nondet: Nondet, subject: Any) -> None:
    """A translated access sets A in each entry on its path, in order, and D in the last of them if
    it is a write: no other bit, no other entry.
    """
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach("write" if access.write == 1 else "no write")
        steps = list(path(cpu, memory, access.address))
        assert len(outcome.updates) == len(steps)
        for step, (address, bits) in zip(steps, outcome.updates, strict=True):
            last = step.level == outcome.level
            assert address == step.address
            assert bits == (ACCESSED | access.write * DIRTY if last else ACCESSED)


@invariant(
    source="Intel SDM Vol. 3A, 4.8; which accessed flags a faulting walk sets is left open",
    reaches=("page fault",),
    needs=(UPDATES,),
    twin="a-denied-write-sets-dirty",
)
def a_fault_sets_at_most_accessed_flags_on_its_path(nondet: Nondet, subject: Any) -> None:
    """A faulting walk sets no D, and A at most in present entries that it used."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, PageFault):
        nondet.reach("page fault")
        reference = translate(cpu, memory, access)
        assert isinstance(reference, PageFault)
        assert len(outcome.may_update) <= len(reference.may_update)
        for update, allowed in zip(outcome.may_update, reference.may_update, strict=False):
            assert (update.address == allowed.address) & (update.bits & ~allowed.bits == 0)


@invariant(
    source="Intel SDM Vol. 3A, 4.8 (the flags are sticky, and no walk consults them)",
    reaches=("write", "no write"),
    needs=(UPDATES, PA),
    twin="a-dirty-page-is-denied",
)
def marking_changes_no_later_walk(nondet: Nondet, subject: Any) -> None:
    """The same access again, after the flags were set in memory, has the same outcome."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    first = subject.translate(cpu, memory, access)
    if isinstance(first, Translated):
        nondet.reach("write" if access.write == 1 else "no write")
        again = subject.translate(cpu, Marked(memory, first.updates), access)
        assert isinstance(again, Translated)
        assert again.pa == first.pa


@invariant(
    source="Intel SDM Vol. 3A, tables 4-15 to 4-20 (Ignored)",
    reaches=("translated", "page fault"),
    needs=(PA, ERROR_CODE, LEVEL),
    twin="a-software-bit-is-reserved",
)
def bits_that_the_architecture_ignores_change_nothing(nondet: Nondet, subject: Any) -> None:
    """Toggling any of the bits that a walk ignores, in every entry, leaves the outcome as it is."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    toggled = nondet.word("toggled", ANY) & IGNORED
    first = subject.translate(cpu, memory, access)
    second = subject.translate(cpu, Altered(memory, toggled), access)
    nondet.reach(kind(first))
    assert type(first) is type(second)
    if isinstance(first, Translated) and isinstance(second, Translated):
        assert (first.pa == second.pa) & (first.level == second.level)
    if isinstance(first, PageFault) and isinstance(second, PageFault):
        assert first.error_code == second.error_code


@invariant(
    source="Intel SDM Vol. 3A, 4.6.2 (CR4.PKE=0 and CR4.PKS=0)",
    reaches=("translated", "page fault"),
    needs=(PA, ERROR_CODE),
    twin="pks-is-ignored",
)
def keys_that_are_off_change_nothing(nondet: Nondet, subject: Any) -> None:
    """While CR4.PKE and CR4.PKS are 0, neither the keys in the entries nor the registers count."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(cpu.pke | cpu.pks == 0)
    toggled = nondet.word("toggled", ANY) & KEY
    blank = type(cpu)._make(cpu._replace(pkru=0, pkrs=0))
    first = subject.translate(cpu, memory, access)
    second = subject.translate(blank, Altered(memory, toggled), access)
    nondet.reach(kind(first))
    assert type(first) is type(second)
    if isinstance(first, Translated) and isinstance(second, Translated):
        assert first.pa == second.pa
    if isinstance(first, PageFault) and isinstance(second, PageFault):
        assert first.error_code == second.error_code


@invariant(
    source="Intel SDM Vol. 3A, 4.5.4 (the low bits of CR3 are PWT, PCD, or a PCID)",
    reaches=("translated", "page fault"),
    needs=(PA,),
    twin="the-pcid-moves-the-root",
)
def the_low_bits_of_cr3_move_nothing(nondet: Nondet, subject: Any) -> None:
    """The root table is at bits MAXPHYADDR-1:12 of CR3, whatever bits 11:0 hold."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    other = type(cpu)._make(cpu._replace(cr3=cpu.cr3 & ~low_bits(12)))
    first, second = subject.translate(cpu, memory, access), subject.translate(other, memory, access)
    nondet.reach(kind(first))
    assert type(first) is type(second)
    if isinstance(first, Translated) and isinstance(second, Translated):
        assert first.pa == second.pa
