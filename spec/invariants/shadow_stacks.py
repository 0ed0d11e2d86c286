"""Invariants of shadow-stack pages (CET): what reaches them, and what reaches nothing else."""

from typing import Any

from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Altered, Memory
from vapama.spec.nondet import EVERY_PAGING, LONG_MODE, PAE_PAGING, PAGING_32, Nondet, invariant
from vapama.spec.outcomes import SS, PageFault, Translated, kind
from vapama.spec.paging import DIRTY, USER, WRITABLE, Step, linear_address, path, translate
from vapama.spec.subject import ERROR_CODE, PA, SHADOW_STACKS, agree, alike
from vapama.spec.words import Condition

MASKED = ("the_address_without_metadata_equals_the_reference",)


def _steps(cpu: Cpu, memory: Memory, access: Access) -> list[Step]:
    """The entries on the path of the access."""
    return list(path(cpu, memory, linear_address(cpu, cpu.mode, access)))


def _is_shadow_stack(steps: list[Step]) -> Condition:
    """Whether a path leads to a shadow-stack page."""
    *above, leaf = steps
    found = (leaf.entry & WRITABLE == 0) & (leaf.entry & DIRTY != 0)
    for step in above:
        found = found & (step.entry & WRITABLE != 0)
    return found


@invariant(
    source="Intel SDM Vol. 3A, 4.5 to 4.8",
    reaches=("translated", "page fault", "non-canonical address", "entry outside memory"),
    needs=(SHADOW_STACKS,),
    twin="shadow-stacks-have-no-keys",
)
def the_walk_to_a_shadow_stack_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """In 4-level and 5-level paging with CR4.CET, of accesses to shadow stacks and others."""
    cpu, memory, access = nondet.walk(LONG_MODE)
    nondet.assume((cpu.masks == 0) & (cpu.cet == 1))
    expected = translate(cpu, memory, access)
    nondet.reach(kind(expected))
    observed = subject.translate(cpu, memory, access)
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="Intel SDM Vol. 3A, 4.6 and 4.6.1 (shadow-stack accesses)",
    reaches=("user shadow stack", "supervisor shadow stack"),
    needs=(SHADOW_STACKS,),
    twin="any-read-only-page-is-a-shadow-stack",
    uses=MASKED,
)
def a_shadow_stack_access_reaches_only_shadow_stack_pages(nondet: Nondet, subject: Any) -> None:
    """It translates only to a page whose own entry is read-only and dirty and all others on its
    path writable: a user's only to a user page, a supervisor's only to a supervisor page.
    """
    cpu, memory, access = nondet.walk(*EVERY_PAGING)
    nondet.assume((access.shadow_stack == 1) & (cpu.cet == 1))
    if isinstance(subject.translate(cpu, memory, access), Translated):
        steps = _steps(cpu, memory, access)
        assert _is_shadow_stack(steps)
        user_page = steps[-1].entry
        for step in steps:
            user_page = user_page & step.entry
        if access.user == 1:
            nondet.reach("user shadow stack")
            assert user_page & USER != 0
        else:
            nondet.reach("supervisor shadow stack")
            assert user_page & USER == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 and 2.5 (CR4.CET needs CR0.WP)",
    reaches=("write translated",),
    needs=(SHADOW_STACKS,),
    twin="dirty-pages-are-writable",
    uses=MASKED,
)
def an_ordinary_write_never_reaches_a_shadow_stack(nondet: Nondet, subject: Any) -> None:
    """With CET no write but one to a shadow stack translates to a shadow-stack page, not even the
    supervisor's: CR0.WP is 1 then.
    """
    cpu, memory, access = nondet.walk(*EVERY_PAGING)
    nondet.assume((access.shadow_stack == 0) & (cpu.cet == 1) & (access.write == 1))
    if isinstance(subject.translate(cpu, memory, access), Translated):
        nondet.reach("write translated")
        assert not _is_shadow_stack(_steps(cpu, memory, access))


@invariant(
    source="Intel SDM Vol. 3A, 4.7 (SS flag)",
    reaches=("to a shadow stack", "ordinary", "without CET"),
    needs=(SHADOW_STACKS, ERROR_CODE),
    twin="ss-is-reported-without-cet",
    bound="addresses that are not masked",
)
def a_page_fault_says_whether_a_shadow_stack_was_meant(nondet: Nondet, subject: Any) -> None:
    """SS is set in the error code of an access to a shadow stack, and of no other; without CR4.CET
    there is no such access.
    """
    cpu, memory, access = nondet.walk(*EVERY_PAGING)
    nondet.assume(cpu.masks == 0)
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, PageFault):
        if access.shadow_stack & cpu.cet == 1:
            nondet.reach("to a shadow stack")
            assert outcome.error_code & SS != 0
        else:
            nondet.reach("without CET" if access.shadow_stack == 1 else "ordinary")
            assert outcome.error_code & SS == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (SMAP governs other data accesses)",
    reaches=("translated", "page fault"),
    needs=(SHADOW_STACKS, PA, ERROR_CODE),
    twin="smap-stops-shadow-stacks",
)
def smap_has_no_part_in_shadow_stack_accesses(nondet: Nondet, subject: Any) -> None:
    """An access to a shadow stack has the same outcome whatever CR4.SMAP and RFLAGS.AC are."""
    cpu, memory, access = nondet.walk(*EVERY_PAGING)
    nondet.assume((access.shadow_stack == 1) & (cpu.cet == 1))
    other = cpu._replace(cr4=cpu.cr4 & ~(1 << 21), rflags=cpu.rflags & ~(1 << 18))
    first = subject.translate(cpu, memory, access)
    second = subject.translate(other, memory, access)
    nondet.reach(kind(first))
    assert alike(first, second)


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 and 4.8 (the dirty flag decides nothing else)",
    reaches=("translated", "page fault"),
    needs=(SHADOW_STACKS, PA, ERROR_CODE),
    twin="dirty-pages-are-writable",
    bound="addresses that are not masked",
)
def to_other_accesses_a_dirty_page_is_like_any(nondet: Nondet, subject: Any) -> None:
    """Toggling the dirty flag of every PTE, PDE and so on changes no access but those to shadow
    stacks; in a PDPTE of PAE paging the bit is reserved.
    """
    cpu, memory, access = nondet.walk(LONG_MODE, PAGING_32, PAE_PAGING)
    nondet.assume((access.shadow_stack & cpu.cet == 0) & (cpu.masks == 0))
    both = DIRTY | DIRTY << 32 if cpu.mode.scale == 2 else DIRTY
    first = subject.translate(cpu, memory, access)
    second = subject.translate(cpu, Altered(memory, both), access)
    nondet.reach(kind(first))
    assert alike(first, second)
