"""Invariants of the 64-bit walk: who may do what.

Each claims one thing about every translation that the subject grants, judged by the entries on its
path alone.
"""

from typing import Any

from vapama.spec.domains import Domain
from vapama.spec.memory import Altered
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import PK, PageFault, Translated
from vapama.spec.paging import EXECUTE_DISABLE, USER, WRITABLE, path
from vapama.spec.subject import ERROR_CODE
from vapama.spec.words import Flag, Word, bit, ite

WHICH = Domain(among=tuple(range(5)))
RIGHTS = Domain(free=WRITABLE | USER | EXECUTE_DISABLE)


def _over_the_path(steps: list[Any]) -> tuple[Word, Word]:
    """The AND and the OR of the entries on a path."""
    every, some = steps[0].entry, steps[0].entry
    for step in steps[1:]:
        every, some = every & step.entry, some | step.entry
    return every, some


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (user-mode accesses)",
    reaches=("user access translated",),
    twin="a-user-page-needs-only-its-leaf",
)
def a_user_access_never_reaches_a_supervisor_page(nondet: Nondet, subject: Any) -> None:
    """A user-mode access translates only if U/S is 1 in every entry on the path."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(access.user == 1)
    if isinstance(subject.translate(cpu, memory, access), Translated):
        nondet.reach("user access translated")
        every, _ = _over_the_path(list(path(cpu, memory, access.address)))
        assert every & USER != 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (data writes)",
    reaches=("write translated", "supervisor write with WP=0 to a read-only page"),
    twin="user-writes-ignore-read-only-without-wp",
)
def a_write_needs_every_entry_writable_unless_supervisor_without_wp(
    nondet: Nondet, subject: Any
) -> None:
    """A write goes through a read-only mapping only for the supervisor with CR0.WP=0."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(access.write == 1)
    if isinstance(subject.translate(cpu, memory, access), Translated):
        every, _ = _over_the_path(list(path(cpu, memory, access.address)))
        if every & WRITABLE != 0:
            nondet.reach("write translated")
        else:
            nondet.reach("supervisor write with WP=0 to a read-only page")
            assert (access.user == 0) & (cpu.wp == 0)


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (instruction fetches)",
    reaches=("fetch translated",),
    twin="no-execute-counts-only-at-the-leaf",
)
def a_fetch_never_comes_from_a_no_execute_page(nondet: Nondet, subject: Any) -> None:
    """A fetch translates only if XD is 0 in every entry on the path."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(access.fetch == 1)
    if isinstance(subject.translate(cpu, memory, access), Translated):
        nondet.reach("fetch translated")
        _, some = _over_the_path(list(path(cpu, memory, access.address)))
        assert some & EXECUTE_DISABLE == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (supervisor-mode fetches, CR4.SMEP)",
    reaches=("supervisor fetch translated",),
    twin="smep-is-ignored",
)
def smep_keeps_the_supervisor_from_executing_user_pages(nondet: Nondet, subject: Any) -> None:
    """With CR4.SMEP a supervisor-mode fetch never translates to a user page."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume((access.fetch == 1) & (access.user == 0) & (cpu.smep == 1))
    if isinstance(subject.translate(cpu, memory, access), Translated):
        nondet.reach("supervisor fetch translated")
        every, _ = _over_the_path(list(path(cpu, memory, access.address)))
        assert every & USER == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (supervisor-mode data accesses, CR4.SMAP)",
    reaches=("exempt by AC", "supervisor page"),
    twin="ac-exempts-implicit-accesses",
)
def smap_keeps_the_supervisor_from_touching_user_pages(nondet: Nondet, subject: Any) -> None:
    """With CR4.SMAP a supervisor-mode data access translates to a user page only if it is explicit
    and RFLAGS.AC is 1.
    """
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume((access.fetch == 0) & (access.user == 0) & (cpu.smap == 1))
    if isinstance(subject.translate(cpu, memory, access), Translated):
        every, _ = _over_the_path(list(path(cpu, memory, access.address)))
        if every & USER != 0:
            nondet.reach("exempt by AC")
            assert (cpu.ac == 1) & (access.implicit == 0)
        else:
            nondet.reach("supervisor page")


def _key_denies(register: Word, entry: Word, strict_write: Flag) -> Flag:
    """Whether AD, or WD for a write that it concerns, is set for the entry's key."""
    key = (entry >> 59) & 0xF
    return bit(register, 2 * key) | bit(register, 2 * key + 1) & strict_write


@invariant(
    source="Intel SDM Vol. 3A, 4.6.2 (user-mode addresses, PKRU)",
    reaches=("data access to a user page", "write disabled but WP=0"),
    twin="a-key-has-three-bits",
)
def pkru_governs_data_accesses_to_user_pages(nondet: Nondet, subject: Any) -> None:
    """With CR4.PKE a data access to a user page translates only if PKRU allows it: AD for none,
    WD not for writes by the user, nor by the supervisor with CR0.WP.
    """
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume((access.fetch == 0) & (cpu.pke == 1))
    if isinstance(subject.translate(cpu, memory, access), Translated):
        steps = list(path(cpu, memory, access.address))
        every, _ = _over_the_path(steps)
        if every & USER != 0:
            nondet.reach("data access to a user page")
            strict = access.write & (access.user | cpu.wp)
            assert _key_denies(cpu.pkru, steps[-1].entry, strict) == 0
            if _key_denies(cpu.pkru, steps[-1].entry, 1) == 1 and access.write == 1:
                nondet.reach("write disabled but WP=0")


@invariant(
    source="Intel SDM Vol. 3A, 4.6.2 (supervisor-mode addresses, IA32_PKRS)",
    reaches=("data access to a supervisor page",),
    twin="supervisor-pages-use-pkru",
)
def pkrs_governs_data_accesses_to_supervisor_pages(nondet: Nondet, subject: Any) -> None:
    """With CR4.PKS a data access to a supervisor page translates only if IA32_PKRS allows it."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume((access.fetch == 0) & (cpu.pks == 1))
    if isinstance(subject.translate(cpu, memory, access), Translated):
        steps = list(path(cpu, memory, access.address))
        every, _ = _over_the_path(steps)
        if every & USER == 0:
            nondet.reach("data access to a supervisor page")
            strict = access.write & (access.user | cpu.wp)
            assert _key_denies(cpu.pkrs, steps[-1].entry, strict) == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.2 and 4.7 (PK flag)",
    reaches=("page fault",),
    needs=(ERROR_CODE,),
    twin="pke-is-ignored",
)
def without_keys_no_fault_blames_one(nondet: Nondet, subject: Any) -> None:
    """With CR4.PKE=0 and CR4.PKS=0, and for every fetch, the error code lacks PK."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume((cpu.pke | cpu.pks == 0) | (access.fetch == 1))
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, PageFault):
        nondet.reach("page fault")
        assert outcome.error_code & PK == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (the AND of R/W and U/S and the OR of XD over a walk)",
    reaches=("translated with less", "no longer translated"),
    twin="two-no-executes-cancel",
)
def rights_never_grow_down_the_walk(nondet: Nondet, subject: Any) -> None:
    """Taking R/W or U/S from one entry, or setting its XD, lets no user access through that did
    not go through before, and moves none elsewhere.
    """
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume((access.user == 1) & (cpu.nxe == 1))
    steps = list(path(cpu, memory, access.address))
    nondet.assume(len(steps) > 0)
    which = nondet.word("which", WHICH)
    _, where, entry = steps[-1]
    for i, step in enumerate(steps):
        where, entry = ite(which == i, step.address, where), ite(which == i, step.entry, entry)
    removed = nondet.word("removed", RIGHTS) & (entry ^ EXECUTE_DISABLE)
    after = subject.translate(cpu, Altered(memory, removed, at=where), access)
    before = subject.translate(cpu, memory, access)
    if isinstance(after, Translated):
        nondet.reach("translated with less")
        assert isinstance(before, Translated)
        assert before.pa == after.pa
    elif isinstance(before, Translated):
        nondet.reach("no longer translated")


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1",
    reaches=("write translated",),
    twin="reads-need-a-writable-page",
)
def who_may_write_may_read(nondet: Nondet, subject: Any) -> None:
    """Where a write translates, a read by the same party translates to the same address."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(access.write == 1)
    write = subject.translate(cpu, memory, access)
    if isinstance(write, Translated):
        nondet.reach("write translated")
        read = subject.translate(cpu, memory, access._replace(write=0))
        assert isinstance(read, Translated)
        assert read.pa == write.pa


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1 (RFLAGS.AC)",
    reaches=("translated",),
    twin="ac-forbids-instead-of-allowing",
)
def setting_ac_never_takes_an_access_away(nondet: Nondet, subject: Any) -> None:
    """What translates with RFLAGS.AC=0 translates alike with RFLAGS.AC=1."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(cpu.ac == 0)
    without = subject.translate(cpu, memory, access)
    if isinstance(without, Translated):
        nondet.reach("translated")
        with_ac = cpu._replace(rflags=cpu.rflags | 1 << 18)
        outcome = subject.translate(type(cpu)._make(with_ac), memory, access)
        assert isinstance(outcome, Translated)
        assert outcome.pa == without.pa
