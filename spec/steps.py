"""Programs: what guests and the host do, step by step, and what a step is seen to do.

The vocabulary that the specification of a machine (`vapama.spec.machine`), an implementation of it
and the programs that are run on both share. Pages of guest-physical memory are numbered by gfn
(guest frame number); `page` is a page of a guest's backing, the private memory of the process that
hosts it, which memory slots map to gfns. Source: the KVM API, Documentation/virt/kvm/api.rst, 4.35
(KVM_SET_USER_MEMORY_REGION) and 4.8 (KVM_GET_DIRTY_LOG).
"""

from typing import NamedTuple, TypeAlias

from vapama.spec.access import Access
from vapama.spec.cpu import LMA, LME, PG, Cpu
from vapama.spec.outcomes import GeneralProtection, NonCanonical, OutsideMemory
from vapama.spec.words import Word

SHADOW, EPT, NPT = "shadow", "ept", "npt"
"""How a hypervisor gives guests their memory: in software, by Intel's and by AMD's hardware."""


class Slot(NamedTuple):
    """A memory slot: `pages` pages at guest frame `gfn`, backed from page `page` of the backing.

    Backings of two slots may overlap; guest frames of two slots may not. A store to a `readonly`
    slot goes to a device, as one to a guest frame that is in no slot does.
    """

    gfn: int
    pages: int
    page: int
    readonly: bool = False


class GuestPlan(NamedTuple):
    """A guest at power-on: its processors, its memory slots, and words of its memory by address.

    `mergeable` are the pages of its backing that same-page merging may share. The first `giants`
    GBytes of its backing after the first are of hugetlbfs, in pages of 1 GByte.
    """

    vcpus: tuple[Cpu, ...]
    slots: dict[int, Slot]
    image: dict[int, Word]
    mergeable: tuple[int, ...] = ()
    giants: int = 0


class Plan(NamedTuple):
    """A machine at power-on: its guests, how they get their memory, and how much of it there is.

    `frames` are pages of machine memory, besides which the pool of hugetlb has `pool` pages of 1
    GByte, the n-th at its n-th GByte. `shadow_pages` is how many pages of tables a guest may
    have before the oldest are reclaimed. `generations` of the memory slots are told apart in what
    is remembered of devices. `host_maxphyaddr` is the real processor's address width,
    `stage_levels` how many levels its second stage has, if it has one. The guests' memory begins
    swapped out, if it is `swapped`. With `multihit`, code is not
    to be fetched from large pages, which hurts some processors; with `zero_pages`, same-page
    merging lets pages of zeros share one frame, whatever else it does. Not every processor has
    `gbyte_pages`, by which its tables map 1 GByte.
    """

    guests: tuple[GuestPlan, ...]
    design: str = SHADOW
    frames: int = 256
    shadow_pages: int = 64
    generations: int = 1 << 11
    host_maxphyaddr: int = 46
    stage_levels: int = 4
    swapped: bool = False
    multihit: bool = False
    zero_pages: bool = False
    pool: int = 0
    gbyte_pages: bool = True

    @property
    def has_pdpte_registers(self) -> bool:
        """Whether guests have the PDPTEs of PAE paging in registers, which MOV to CR3 loads. With
        nested paging each walk reads them from memory instead (APM Vol. 2, 15.25.10).
        """
        return self.design != NPT


# What guests do.


class Load(NamedTuple):
    """Read (or fetch) the 8 bytes at a linear address, which may lie across two pages."""

    guest: int
    vcpu: int
    access: Access


class Store(NamedTuple):
    """Write 8 bytes at a linear address, which may lie across two pages."""

    guest: int
    vcpu: int
    access: Access
    value: Word


class Move(NamedTuple):
    """MOV to CR0, CR3 or CR4, WRMSR to EFER, WRPKRU, or a change of RFLAGS.AC.

    `register` names the field of `Cpu`. Bit 63 of a value for CR3 is not stored: with CR4.PCIDE it
    asks that the PCID's translations be kept.
    """

    guest: int
    vcpu: int
    register: str
    value: Word

    def on(self, cpu: Cpu) -> Cpu:
        """The control state after it; bit 63 of CR3 aside, as it is written. It is not checked.

        EFER.LMA follows from LME and CR0.PG (SDM Vol. 3A, 4.1.1). PDPTEs are not loaded.
        """
        fields = zip(Cpu._fields, cpu, strict=True)
        after = Cpu._make(self.value if name == self.register else old for name, old in fields)
        active = after.efer & LME and after.cr0 & PG
        return after._replace(efer=after.efer & ~LMA | (LMA if active else 0))


class Invlpg(NamedTuple):
    """INVLPG of a linear address."""

    guest: int
    vcpu: int
    address: Word


class Invpcid(NamedTuple):
    """INVPCID: type 0 an address of a PCID, 1 a PCID, 2 everything, 3 all but global pages."""

    guest: int
    vcpu: int
    kind: int
    pcid: int
    address: Word


# What the host does.


class Unmap(NamedTuple):
    """Swap a page of a guest's backing out: its frame is freed."""

    guest: int
    page: int


class Migrate(NamedTuple):
    """Move a page of a guest's backing to another frame."""

    guest: int
    page: int


class SetSlot(NamedTuple):
    """Create, move, change or (with None) delete a memory slot."""

    guest: int
    number: int
    slot: Slot | None


class Log(NamedTuple):
    """Start or stop dirty logging of a memory slot."""

    guest: int
    number: int
    on: bool


class Harvest(NamedTuple):
    """Get a slot's dirty log, and clear it."""

    guest: int
    number: int


class Reclaim(NamedTuple):
    """Memory pressure: free the oldest so many pages of a guest's shadow or second-stage tables."""

    guest: int
    tables: int


class Evict(NamedTuple):
    """The real processor drops all that a virtual one has cached, as it may at any time."""

    guest: int
    vcpu: int


class Scan(NamedTuple):
    """Same-page merging looks at all that it may merge, of every guest, once."""


class Unmerge(NamedTuple):
    """Every page that was merged gets a frame of its own back."""


class Collapse(NamedTuple):
    """Make the 2 MBytes of a guest's backing around a page one huge page, if frames are free."""

    guest: int
    page: int


class Split(NamedTuple):
    """Make the huge page around a page of a guest's backing 512 pages again, where they are."""

    guest: int
    page: int


class Rest(NamedTuple):
    """Nothing happens."""


GuestStep: TypeAlias = Load | Store | Move | Invlpg | Invpcid
HostStep: TypeAlias = (
    Unmap
    | Migrate
    | SetSlot
    | Log
    | Harvest
    | Reclaim
    | Evict
    | Scan
    | Unmerge
    | Collapse
    | Split
    | Rest
)
Step: TypeAlias = GuestStep | HostStep


# What a step is seen to do, if it doesn't end in an `Outcome`.


class Loaded(NamedTuple):
    """The load gave this value."""

    value: Word


class Stored(NamedTuple):
    """The store was made; `devices` are the parts of it that went to a device."""

    devices: "tuple[DeviceWrite, ...]" = ()


class Faulted(NamedTuple):
    """A page fault: its error code, and the linear address that CR2 then holds, the first of the
    access, or of the access in its second page. Source: SDM Vol. 3A, 4.7 and 6.15.
    """

    error_code: Word
    cr2: Word


class DeviceWrite(NamedTuple):
    """So many bytes of `value` written to a device at a guest-physical address."""

    address: int
    size: int
    value: Word


class Harvested(NamedTuple):
    """The guest frames that a dirty log named."""

    gfns: frozenset[int]


class Done(NamedTuple):
    """The step was made; there is nothing to see."""


Refused: TypeAlias = GeneralProtection | NonCanonical | OutsideMemory
Seen: TypeAlias = Loaded | Stored | Harvested | Done | Faulted | Refused


def device_word(address: Word) -> Word:
    """What a device gives for the aligned 8 bytes at a guest-physical address: always the same."""
    return (address ^ 0x5A5A_0000_0000_0000) & ((1 << 64) - 1)
