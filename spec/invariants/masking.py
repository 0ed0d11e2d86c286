"""Invariants of linear-address masking (LAM): which bits of a pointer may hold anything.

Which bits those are is told here anew, by the table of the manual: LAM48 and LAM57, for the user's
half of the address space and the supervisor's.
"""

from typing import Any

from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LAM_SUP, LAM_U48, LAM_U57, Cpu
from vapama.spec.domains import ANY
from vapama.spec.memory import Sparse
from vapama.spec.nondet import LONG_MODE, Nondet, invariant
from vapama.spec.outcomes import NonCanonical, Translated, kind
from vapama.spec.paging import translate, without_metadata
from vapama.spec.subject import ERROR_CODE, MANY, MASKING, METADATA, PA, SHADOW_STACKS, agree, alike
from vapama.spec.words import WORD, Word, bit, low_bits

LAM57, LAM48 = low_bits(63) & ~low_bits(57), low_bits(63) & ~low_bits(48)


def _metadata(cpu: Cpu, access: Access) -> Word:
    """The bits of the access's address that may hold metadata."""
    if access.fetch == 1:
        return 0
    if bit(access.address, 63) == 1:
        if cpu.cr4 & LAM_SUP == 0:
            return 0
        return LAM57 if cpu.cr4 & LA57 != 0 else LAM48
    if cpu.cr3 & LAM_U57 != 0:
        return LAM57
    return LAM48 if cpu.cr3 & LAM_U48 != 0 else 0


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1; Vol. 3A, 4.1.4 and 4.5 (CR3)",
    reaches=("masked", "as it is"),
    needs=(METADATA,),
    equates=(without_metadata, METADATA),
    twin="the-supervisors-mask-is-the-users",
)
def the_address_without_metadata_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """The linear address that is walked is that of the reference: the step that masks it, alone."""
    cpu, access = nondet.cpu(LONG_MODE), nondet.access(LONG_MODE)
    expected = without_metadata(cpu, access)
    nondet.reach("as it is" if expected == access.address else "masked")
    assert subject.without_metadata(cpu, access) == expected


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1; Vol. 3A, 4.5 to 4.8",
    reaches=("translated", "page fault", "non-canonical address", "entry outside memory"),
    needs=(MASKING,),
    twin="lam48-wins-over-lam57",
    uses=("the_address_without_metadata_equals_the_reference",),
)
def the_walk_of_a_masked_address_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """In 4-level and 5-level paging, with any masking that is on."""
    cpu, memory, access = nondet.walk(LONG_MODE)
    nondet.assume((cpu.masks != 0) & (cpu.cet == 0))
    expected = translate(cpu, memory, access)
    nondet.reach(kind(expected))
    observed = subject.translate(cpu, memory, access)
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1 (linear-address masking)",
    reaches=("translated", "page fault", "non-canonical address"),
    needs=(MASKING, PA, ERROR_CODE),
    twin="lam48-masks-too-few-bits",
)
def metadata_in_a_masked_address_changes_nothing(nondet: Nondet, subject: Any) -> None:
    """Toggling any bits of an address that are masked leaves the outcome as it is."""
    cpu, memory, access = nondet.walk(LONG_MODE)
    nondet.assume(cpu.masks != 0)
    toggled = nondet.word("toggled", ANY) & _metadata(cpu, access)
    nondet.assume(toggled != 0)
    first = subject.translate(cpu, memory, access)
    other = access._replace(address=access.address ^ toggled)
    second = subject.translate(cpu, memory, other)
    nondet.reach(kind(first))
    assert alike(first, second)


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1; Vol. 3A, 4.5",
    reaches=("fetch translated",),
    needs=(MASKING, PA, ERROR_CODE),
    twin="fetches-are-masked-too",
)
def a_fetch_is_never_masked(nondet: Nondet, subject: Any) -> None:
    """A fetch has the outcome that it has with masking turned off."""
    cpu, memory, access = nondet.walk(LONG_MODE)
    nondet.assume(access.fetch == 1)
    off = cpu._replace(cr3=cpu.cr3 & ~(LAM_U57 | LAM_U48), cr4=cpu.cr4 & ~LAM_SUP)
    first = subject.translate(cpu, memory, access)
    second = subject.translate(off, memory, access)
    if isinstance(first, Translated):
        nondet.reach("fetch translated")
    assert alike(first, second)


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1 (canonicality with masking)",
    reaches=("walked", "refused"),
    needs=(MASKING,),
    twin="the-mask-takes-bit-63-too",
    bound="an empty memory: what is there decides nothing of it",
)
def masking_never_leaves_the_half_of_the_address_space(nondet: Nondet, subject: Any) -> None:
    """An access is walked if and only if those bits of its address are equal that canonicality
    without masking wants equal and the mask spares; by LAM48 bits 63 and 47.
    """
    cpu, _, access = nondet.walk(LONG_MODE)
    outcome = subject.translate(cpu, Sparse({}, 0), access)
    metadata = _metadata(cpu, access)
    lowest = 56 if cpu.cr4 & LA57 != 0 and metadata != LAM48 else 47
    checked = WORD & ~low_bits(lowest) & ~metadata
    bits = access.address & checked
    if (bits == 0) | (bits == checked):
        nondet.reach("walked")
        assert not isinstance(outcome, NonCanonical)
    else:
        nondet.reach("refused")
        assert isinstance(outcome, NonCanonical)


@invariant(
    source="the batch kernel is the scalar walk, address by address",
    reaches=("translated", "page fault", "non-canonical address"),
    needs=(MASKING, SHADOW_STACKS, MANY, PA, ERROR_CODE),
    twin="a-batch-of-shadow-stack-accesses-is-ordinary",
    bound="batches of 1 address, 4-level paging",
)
def translate_many_equals_the_walk_of_a_masked_address(nondet: Nondet, subject: Any) -> None:
    """A batch of masked addresses, or of accesses to shadow stacks, has the walk's outcome too."""
    cpu, memory, access = nondet.walk(LONG_MODE)
    nondet.assume((cpu.masks != 0) | (access.shadow_stack == 1))
    nondet.assume(cpu.cr4 & LA57 == 0)
    alone = subject.translate(cpu, memory, access)
    (many,) = subject.translate_many(cpu, memory, [access.address], access)
    nondet.reach(kind(alone))
    assert alike(alone, many)
