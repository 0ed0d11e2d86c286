"""Subjects: the implementations of address translation that can be checked against this spec.

A subject is anything with `capabilities` and `translate`. It says what it can observe, and an
invariant compares only that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self, TypeAlias

from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.anatomy import MachineView
from vapama.spec.cpu import Cpu
from vapama.spec.domains import Domain
from vapama.spec.memory import Memory
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.stage import Stage
from vapama.spec.steps import Plan, Seen, Step
from vapama.spec.words import Condition, Flag, Word

# What a subject can be able to observe.
TRANSLATE = "translate"
"""Has `translate`. It need not be told: whoever has the method observes it."""
PA = "pa"
"""The physical address of a translated access."""
LEVEL = "level"
"""The level that maps the page, that is its size."""
ERROR_CODE = "error code"
"""The page-fault error code; of a second stage the exit qualification, or EXITINFO1."""
UPDATES = "updates"
"""The accessed and dirty flags set, entry by entry in the order of the walk."""
EFFECTS = "effects"
"""The accessed and dirty flags as found in memory afterwards: newly set bits by address."""
LOADS = "loads"
"""Each entry that the walk reads (it reads them through `Memory.load`)."""
MANY = "translate_many"
"""Has `translate_many`."""
OTHER_MODES = "other modes"
"""Translates in 32-bit and PAE paging and without paging too, as far as `narrow` lets it."""
MASKING = "linear-address masking"
"""Knows the control bits of linear-address masking."""
METADATA = "without_metadata"
"""Has `without_metadata`: the step of a walk that masks the linear address, by itself."""
SHADOW_STACKS = "shadow stacks"
"""Knows accesses to shadow stacks, and CR4.CET."""
PDPTES = "load_pdptes"
"""Has `load_pdptes`, which gives the registers or why they are refused, as `paging.load_pdptes`."""
NESTED, NESTED_MANY = "translate_nested", "translate_nested_many"
"""Have `translate_nested` and `translate_nested_many`: a guest's accesses through both stages."""
SECOND_STAGE = "second_stage"
"""Has `second_stage`: it translates guest-physical addresses."""
SECOND_STAGE_MANY = "second_stage_many"
"""Has `second_stage_many`."""
VMM = "vmm"
"""Has `vmm`: it runs programs of guest and host steps as a hypervisor."""
VIEW = "view"
"""What `vmm` gives shows its tables: it has `view` and `watch`."""
OVERCOMMIT = "overcommit"
"""What `vmm` gives also merges equal pages of its guests, and makes them huge."""
TLB = "tlb"
"""Has `tlb`: a processor that caches translations."""
GUEST_TLB = "guest tlb"
"""Has `guest_tlb`: a processor that caches what two stages translate."""
CACHED = "cached"
"""What that processor has cached can be set up (`Tlb.put`), on any memory, whatever is in it."""
KSM = "ksm"
"""Has `ksm`: processes and the merger of their pages, driven step by step."""
KSM_HOST = "ksm host"
"""What `ksm` gives can also pin, migrate, collapse and move, and tells its `uses` of frames."""
SHARING = "sharing"
"""Has `sharing`: what becomes of a page's word as frames are shared."""
HUGETLB = "hugetlb"
"""Has `hugetlb`: a pool of huge pages and the mappings that use it."""
HUGETLB_BOOKS = "hugetlb books"
"""What `hugetlb` gives also has failing copies, subpools and groups that are charged."""
THP = "thp"
"""Has `thp`: a block of memory that is one huge page or 512 small ones, driven step by step."""
POOL = "pool"
"""Has `pool`: hugetlb accounting, in words."""
LARGE_PAGES = "large pages"
"""Has `large_pages`: alignment, split and collapse, in words."""


@dataclass(frozen=True)
class Capabilities:
    """What a subject covers and observes.

    `symbolic`: it runs on symbolic words, so that it can be proved. `preload`: it needs all the
    entries that a walk will read before it starts (a real machine does), not one by one.
    `narrow`: draws, by name, that the subject can take only some values of. `confirmations`: how
    often a failing Case must fail again to count, on a subject that others may disturb. `unseen`:
    what invariants are to reach, by its label, and this subject never does.
    """

    observes: frozenset[str]
    symbolic: bool = False
    preload: bool = False
    narrow: Mapping[str, Domain] = field(default_factory=dict)
    confirmations: int = 0
    unseen: frozenset[str] = frozenset()


class Cached(NamedTuple):
    """Something that a processor has cached: a page, or a table that walks come to.

    `level` is that of the entry that maps the page or references the table, and `address` the
    first linear address that it serves. `entry` has the form of such an entry: frame, dirty flag
    and protection key are its own; R/W and U/S are 1 if they are in all entries down to it, XD if
    it is in one; and bit 3 of a page's is 1 if R/W is in all entries above it. PCID is 0 for what
    is global.
    """

    is_table: Flag
    level: int
    address: Word
    entry: Word
    vpid: Word
    pcid: Word
    is_global: Flag


class Tlb(Protocol):
    """A processor that caches translations, with a memory of its own: what `tlb` gives.

    `tlb(cpu, memory, vpid=0, sets=1)` begins with nothing cached, in caches of about so many sets.
    Claims about a single step set up what is cached by `put` (see `CACHED`).
    """

    def translate(self, access: Access) -> Outcome:
        """The outcome of an access; its updates are the flags that it set in memory."""

    def write(self, address: Word, value: Word) -> None:
        """Memory changes; nothing is invalidated."""

    def change(self, cpu: Cpu) -> None:
        """MOV to CR0 or CR4, or a write to another register that translation depends on."""

    def mov_cr3(self, operand: Word) -> None:
        """MOV to CR3, bit 63 of its operand included."""

    def invlpg(self, address: Word) -> None:
        """INVLPG."""

    def invpcid(self, kind: int, pcid: Word = 0, address: Word = 0) -> None:
        """INVPCID of a type from 0 to 3."""

    def vm_transition(self, cpu: Cpu, vpid: Word = 0) -> None:
        """A VM entry or VM exit, to this control state and VPID (0 for the host)."""

    def invvpid(self, kind: int, vpid: Word = 0, address: Word = 0) -> None:
        """INVVPID of a type from 0 to 3."""

    def put(self, cached: Cached) -> None:
        """Cache this."""

    def cached(self) -> list[Cached]:
        """All that is cached."""


class GuestTlb(Tlb, Protocol):
    """A processor that runs a guest on a second stage: what `guest_tlb` gives.

    `guest_tlb(cpu, stage, memory, vpid=1, sets=1)` begins with nothing cached; memory is the
    host's. With nested paging a VPID is an ASID.
    """

    def enter(self, cpu: Cpu, stage: Stage, vpid: Word = 1, tlb_control: int = 0) -> None:
        """A VM entry or VMRUN to a guest with this control state and second stage."""

    def invept(self, kind: int, eptp: Word = 0) -> None:
        """INVEPT of type 1 or 2."""


class Subject(Protocol):
    """An implementation of address translation."""

    capabilities: Capabilities

    def translate(self, cpu: Cpu, memory: Memory, access: Access) -> Outcome:
        """The outcome of one access from a clean state (no cached translations).

        Raises `NotCovered` for a case outside what the subject can be asked.
        """


class BatchSubject(Subject, Protocol):
    """A subject that also translates many addresses in one call."""

    def translate_many(
        self, cpu: Cpu, memory: Memory, addresses: Sequence[Word], access: Access
    ) -> list[Outcome]:
        """The outcomes of `access` at each of `addresses`; no flags are set on the way."""


class SecondStageSubject(Subject, Protocol):
    """A subject that also translates guest-physical addresses, by EPT or nested page tables."""

    def second_stage(self, stage: Stage, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
        """The outcome of one access from a clean state (no cached translations).

        Raises `NotCovered` for a case outside what the subject can be asked.
        """


class SecondStageBatchSubject(SecondStageSubject, Protocol):
    """A subject that also translates many guest-physical addresses in one call."""

    def second_stage_many(
        self, stage: Stage, memory: Memory, gpas: Sequence[Word], access: GuestPhysicalAccess
    ) -> list[Outcome]:
        """The outcomes of `access` at each of `gpas`; no flags are set on the way."""


class Hypervisor(Protocol):
    """A hypervisor's memory subsystem at work, with all that its guests have.

    One that cannot make every step has `fit(step)`: the step as it can make it, `Rest()` for one
    that it cannot. One that needs something of its own in the guests' memory has `plan`: the plan
    that it was given, with that. One that can tell which words of a guest's memory are not 0 has
    `held(guest)`: their set, as words of the backing.
    """

    def do(self, step: Step) -> Seen:
        """Make a step, and say what was seen of it."""

    def word(self, guest: int, address: Word) -> Word:
        """A guest's word at an aligned guest-physical address in a slot, as the host has it."""

    def view(self) -> MachineView:
        """All that an audit looks at. It and `watch` are asked of one that has `VIEW`."""

    def watch(self, freed: Callable[[int], None], synced: Callable[[int, int], None]) -> None:
        """Have `freed` told of each frame just before it is freed, and `synced` of each root, by
        guest and frame, just after all below it was synchronized.
        """


class ClonedHypervisor(Hypervisor, Protocol):
    """A hypervisor that can be copied, which is not asked for and makes the exhaustive engine many
    times as fast.
    """

    def clone(self) -> Self:
        """Another that goes on from the same state, which nobody watches: no step of either changes
        the other.
        """


class HypervisorSubject(Protocol):
    """A subject that runs programs as a hypervisor."""

    capabilities: Capabilities

    def vmm(self, plan: Plan) -> Hypervisor:
        """The hypervisor at power-on."""


class NotCovered(Exception):
    """The subject cannot be asked this case; say why."""


Effects: TypeAlias = dict[int, int]


def agree(
    expected: Outcome, observed: Outcome, memory: Memory, capabilities: Capabilities
) -> Condition:
    """Whether what a subject observed is what the reference allows.

    Compares the kind of outcome, and of it only what the subject observes. Bits of an error code
    that the manuals leave open are not compared, and any subset of the flags that a faulting walk
    may set is right.
    """
    if type(expected) is not type(observed):
        return False
    observes = capabilities.observes
    if isinstance(expected, Translated) and isinstance(observed, Translated):
        same = _flags_agree(expected.updates, observed.updates, memory, observes)
        if PA in observes:
            same = same & (expected.pa == observed.pa)
        if LEVEL in observes:
            same = same & (expected.level == observed.level)
        return same
    if isinstance(expected, PageFault) and isinstance(observed, PageFault):
        same = _flags_allowed(expected.may_update, observed.may_update, memory, observes)
        if ERROR_CODE in observes:
            difference = expected.error_code ^ observed.error_code
            same = same & (difference & ~expected.open_bits == 0)
        return same
    if isinstance(expected, EptViolation) and isinstance(observed, EptViolation):
        same = _flags_allowed(expected.may_update, observed.may_update, memory, observes)
        if ERROR_CODE in observes:
            difference = expected.qualification ^ observed.qualification
            same = same & (difference & ~expected.open_bits == 0)
        return same & (expected.gpa == observed.gpa)
    if isinstance(expected, NestedPageFault) and isinstance(observed, NestedPageFault):
        same = _flags_allowed(expected.may_update, observed.may_update, memory, observes)
        if ERROR_CODE in observes:
            difference = expected.exitinfo1 ^ observed.exitinfo1
            same = same & (difference & ~expected.open_bits == 0)
        return same & (expected.gpa == observed.gpa)
    if isinstance(expected, EptMisconfiguration) and isinstance(observed, EptMisconfiguration):
        same = _flags_allowed(expected.may_update, observed.may_update, memory, observes)
        return same & (expected.gpa == observed.gpa)
    if isinstance(expected, OutsideMemory) and isinstance(observed, OutsideMemory):
        same = _flags_allowed(expected.may_update, observed.may_update, memory, observes)
        return same & (expected.address == observed.address)
    return isinstance(expected, NonCanonical)


def alike(first: Outcome, second: Outcome) -> Condition:
    """Whether two accesses go to the same address by a page of the same size, or are the same fault
    with the same error code.
    """
    if type(first) is not type(second):
        return False
    match first, second:
        case Translated(), Translated():
            return (first.pa == second.pa) & (first.level == second.level)
        case PageFault(), PageFault():
            return first.error_code == second.error_code
        case OutsideMemory(), OutsideMemory():
            return first.address == second.address
    return True


def _flags_agree(
    expected: tuple[Update, ...],
    observed: tuple[Update, ...],
    memory: Memory,
    observes: frozenset[str],
) -> Condition:
    if UPDATES in observes:
        return expected == observed
    if EFFECTS in observes:
        return effects(expected, memory) == effects(observed, memory)
    return True


def _flags_allowed(
    allowed: tuple[Update, ...],
    observed: tuple[Update, ...],
    memory: Memory,
    observes: frozenset[str],
) -> Condition:
    """Whether the flags set on a faulting walk are among those that may be."""
    if not observed or not observes & {UPDATES, EFFECTS}:
        return True
    may, did = effects(allowed, memory), effects(observed, memory)
    return all(bits & ~may.get(address, 0) == 0 for address, bits in did.items())


def effects(updates: tuple[Update, ...], memory: Memory) -> Effects:
    """The bits that these updates newly set in memory, by address, where there are any."""
    gathered: Effects = {}
    for address, bits in updates:
        gathered[address] = gathered.get(address, 0) | bits
    new = {address: bits & ~memory.load(address) for address, bits in gathered.items()}
    return {address: bits for address, bits in new.items() if bits}
