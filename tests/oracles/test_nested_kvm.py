"""KVM in an emulator: programs of steps on its shadow MMU and on its MMU for nested page tables,
the known departures, and that the judge sees what a hypervisor must not do.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from random import Random

import pytest

from vapama import oracle_programs
from vapama.oracle_programs import Tally, draw, finish, give, judge, of_steps, ready
from vapama.oracles import linux, nested_kvm
from vapama.oracles.emulator import CannotStart
from vapama.oracles.nested_kvm import NestedKvm, can
from vapama.spec import programs
from vapama.spec.access import Access
from vapama.spec.cpu import AC, LMA, LME, PAE, RFLAGS_ONE, SMAP, Cpu
from vapama.spec.steps import (
    Harvest,
    Invlpg,
    Invpcid,
    Load,
    Log,
    Migrate,
    Move,
    Reclaim,
    SetSlot,
    Step,
    Store,
    Unmap,
)

LOW, DIRECTORY, POINTERS, ROOT = (
    frame << 12 for frame in (programs.LOW, programs.DIRECTORY, programs.POINTERS, programs.ROOT)
)
USED = programs.USED
WP_IS_0 = 1 << 20
"""The style of programs that begin with CR0.WP clear."""


@pytest.fixture(scope="module", params=[False, True], ids=["kvm-shadow", "kvm-tdp"])
def hypervisor(request: pytest.FixtureRequest) -> Iterator[NestedKvm]:
    try:
        made = NestedKvm(request.param)
    except CannotStart as why:
        pytest.skip(str(why))
    made.set_image(nested_kvm.image(ready(programs.plan()).guests[0]))
    yield made
    made.end()


def load(address: int, user: int = 1, fetch: int = 0) -> Load:
    return Load(0, 0, Access(address, user=user, fetch=fetch))


def store(address: int, value: int = 0x5555, user: int = 1) -> Store:
    return Store(0, 0, Access(address, 1, user=user), value)


def ran(hypervisor: NestedKvm, *steps: Step) -> Tally:
    """What came of a program of these steps."""
    program = of_steps(WP_IS_0, (), lambda machine: iter(steps))
    tally = Tally()
    give(hypervisor, [program])
    for done, results in finish(hypervisor, [program], tally):
        judge(done, results, tally, hypervisor.npt)
    return tally


def test_a_program_of_every_kind_of_step_agrees(hypervisor: NestedKvm) -> None:
    steps = (
        Log(0, 0, True),
        load(0x8000),
        store(0x8010),
        load(0x8800, fetch=1),
        load(0x201800, user=0, fetch=1),
        Migrate(0, 8),
        load(0x8010),
        load(0x10010),
        Unmap(0, 8),
        load(0x8010),
        store(LOW | 8 << 3, 9 << 12 | USED),
        load(0x8010),
        Invlpg(0, 0, 0x8000),
        load(0x8010),
        Load(0, 1, Access(0x8010, user=1)),
        Load(1, 0, Access(0x8010, user=1)),
        store(LOW | 9 << 3, 0),
        Invlpg(0, 0, 0x9000),
        store(0x9000),
        Harvest(0, 0),
        SetSlot(0, 1, None),
        load(0x10010),
        SetSlot(0, 1, programs.ALIAS),
        load(0x10010),
        Reclaim(0, 1),
        Move(0, 0, "cr3", programs.OTHER_ROOT << 12),
        load(0x8010),
        store(0x1E000),
        load(1 << 47),
        Move(0, 0, "cr4", 1 << 20 | 1 << 5),
        load(0x8000, user=0),
    )
    tally = ran(hypervisor, *steps)
    assert not tally.differences, tally.differences[0].what
    assert not tally.known
    assert tally.steps == len(steps)
    kinds = {"loaded", "stored", "fetched", "page fault", "stored to a device"}
    assert kinds <= tally.agreed.keys()


def test_random_programs_agree(hypervisor: NestedKvm) -> None:
    tally = oracle_programs.run(hypervisor, 100, seed=1, seconds=8)
    assert not tally.differences, oracle_programs.as_json(tally)
    assert tally.steps > 10 * tally.judged > 0


# WHAT THE JUDGE SEES


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (
            Invlpg,
            (
                load(0x8000),
                store(LOW | 8 << 3, 9 << 12 | USED),
                Invlpg(0, 0, 0x8000),
                load(0x8000),
            ),
        ),
        (
            Move,
            (
                load(0x8000),
                store(LOW | 8 << 3, 9 << 12 | USED),
                Move(0, 0, "cr3", programs.ROOT << 12),
                load(0x8000),
            ),
        ),
        (SetSlot, (SetSlot(0, 1, None), load(0x10000))),
        (Log, (Log(0, 0, True), store(0x8000), Harvest(0, 0))),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_step_that_the_hypervisor_does_not_make_is_found(
    hypervisor: NestedKvm,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Step],
    steps: Sequence[Step],
) -> None:
    assert not ran(hypervisor, *steps).differences
    if hypervisor.npt and kind in (Invlpg, Move):
        pytest.skip("nothing stays cached here: QEMU drops its TLB whenever it leaves a guest")
    real = nested_kvm.command

    def command(step: Step, cpu: Cpu) -> nested_kvm.Command | None:
        return None if isinstance(step, kind) else real(step, cpu)

    monkeypatch.setattr(nested_kvm, "command", command)
    assert ran(hypervisor, *steps).differences


def test_a_word_that_changes_by_itself_is_found(
    hypervisor: NestedKvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = bytearray(nested_kvm.image(ready(programs.plan()).guests[0]))
    spoiled[12 << 12 | 0x400] ^= 1
    monkeypatch.setattr(nested_kvm, "image", lambda guest: bytes(spoiled))
    hypervisor.set_image(bytes(spoiled))
    try:
        steps = (store(12 << 12 | 0x3F8), load(12 << 12 | 0x400))
        assert ran(hypervisor, *steps).differences
    finally:
        monkeypatch.undo()
        hypervisor.set_image(nested_kvm.image(ready(programs.plan()).guests[0]))


# KNOWN DEPARTURES

ROM = programs.ROM_TABLE << 12
SHOWN: dict[str, tuple[Step, ...]] = {
    "table-outside-memory-is-not-present": (
        store(DIRECTORY | 3 << 3, programs.DEVICE << 12 | USED),
        load(0x600010),
    ),
    "store-to-a-device-is-not-walked-for": (
        load(0x1E000, user=0),
        store(0x1E000, user=0),
    ),
    "page-fault-leaves-what-is-stale": (
        load(0x9000),
        Store(0, 1, Access(LOW | 9 << 3, 1), 9 << 12 | USED & ~1),
        store(0x9008),
        load(0x9010),
    ),
    "load-from-a-device-in-page-0-sets-dirty": (
        store(LOW, programs.DEVICE << 12 | programs.OPEN),
        load(0x38),
    ),
    "execute-disable-is-not-reserved-once-shared": (
        Move(0, 1, "efer", LME | LMA),
        store(LOW | 9 << 3, 9 << 12 | USED | 1 << 63),
        load(0x9000),
        Load(0, 1, Access(0x9008, user=1)),
    ),
    "smap-is-lost-where-wp-is-0": (
        Move(0, 0, "cr4", PAE | SMAP),
        Move(0, 0, "rflags", RFLAGS_ONE | AC),
        store(0x206000, user=0),  # the user's, and not to be written: KVM makes it the kernel's
        Move(0, 0, "rflags", RFLAGS_ONE),
        load(0x206008, user=0),
    ),
    "memory-put-over-a-device-is-missed": (
        SetSlot(0, 2, None),
        load(0x819028),
        Store(0, 1, Access(0x4040E8, 1), 7 << 12 | programs.OPEN),  # the table is not in sync
        SetSlot(0, 2, programs.ROM),
        load(0x8000),  # and now it is
        load(0x19018),
    ),
    "code-in-a-device-is-not-emulated": (load(0x1E800, fetch=1),),
    "store-across-pages-is-half-made": (
        load(0x3000),
        store(0x203FFA),  # KVM emulates it: the first page holds a table that it shadows
        store(DIRECTORY | 1 << 3, ROM | USED),
        store(0x20BFFA),  # and this one under nested paging: the table cannot be written
    ),
    "reserved-bit-fault-lacks-p": (store(LOW | 9 << 3, 9 << 12 | USED | 1 << 45), load(0x9000)),
    "reserved-large-page-is-marked-accessed": (store(POINTERS, 0x1FE0_4D97), load(0x2010)),
    "nested-fault-of-a-table-is-taken-for-the-access": (
        store(DIRECTORY | 1 << 3, ROM | USED),
        store(0x205028, user=0),
    ),
    "tables-in-read-only-memory-hang-the-guest": (
        load(0x19038),
        store(DIRECTORY | 2 << 3, ROM | USED),
        store(0x40E010, user=0),
    ),
    "emulated-code-lacks-int3": (
        # On the shadow MMU another processor has not heard yet that there is no device any more;
        Load(0, 1, Access(0x214020)),
        load(0x41C020, user=0),
        Store(0, 1, Access(0x2050A0, 1, user=1), 14 << 12 | programs.OPEN | 0x20),
        load(0x214800, fetch=1),
        # under nested paging a table cannot be written.
        store(DIRECTORY | 3 << 3, ROM | USED),
        load(0x618800, fetch=1),
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_known_departure_is_still_there(hypervisor: NestedKvm, name: str) -> None:
    known = nested_kvm.DEPARTURES_OF_TDP if hypervisor.npt else nested_kvm.DEPARTURES
    tally = ran(hypervisor, *SHOWN[name])
    assert not tally.differences, tally.differences[0].what
    if name in known:
        assert set(tally.known) == {name}
    else:
        assert name not in tally.known


def test_the_departures_are_those_with_a_source() -> None:
    for npt, sources in ((False, nested_kvm.DEPARTURES), (True, nested_kvm.DEPARTURES_OF_TDP)):
        assert oracle_programs.DEPARTURES[npt].keys() == sources.keys()


def test_a_departure_excuses_nothing_else(
    hypervisor: NestedKvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The value of a store to a device is another than the guest's: no name is there for that.
    real = nested_kvm.command

    def command(step: Step, cpu: Cpu) -> nested_kvm.Command | None:
        made = real(step, cpu)
        return made and (made._replace(c=made.c ^ 1) if isinstance(step, Store) else made)

    monkeypatch.setattr(nested_kvm, "command", command)
    for steps in (SHOWN["store-to-a-device-is-not-walked-for"], (store(0x8000),)):
        assert ran(hypervisor, *steps).differences


def test_a_store_by_another_name_of_a_table_is_missed_by_the_shadow_mmu_alone(
    hypervisor: NestedKvm,
) -> None:
    # A finding, and no known departure: no random program for KVM has tables with two names.
    steps = (
        SetSlot(0, 1, programs.TABLES),
        load(0x8000),
        store(0x11000, 0),  # the first entry of the page directory, by guest frame 0x19
        Invlpg(0, 0, 0x8000),
        load(0x8000),
    )
    tally = ran(hypervisor, *steps)
    if hypervisor.npt:
        assert not tally.differences, tally.differences[0].what
        assert tally.agreed["page fault"] == 1
    else:
        (difference,) = tally.differences
        assert "was seen to be the value 0x1111; allowed: #PF 0x4" in difference.what


# WHAT IS SET UP


def test_a_hypervisor_that_is_killed_is_started_again(hypervisor: NestedKvm) -> None:
    programs_ = [next(draw(Random(n), hypervisor.cr4)) for n in range(4)]
    tally = Tally()
    give(hypervisor, programs_)
    os.kill(hypervisor.pid, signal.SIGKILL)
    done = finish(hypervisor, programs_, tally)
    for program, results in done:
        judge(program, results, tally, hypervisor.npt)
    assert tally.deaths == 1
    assert tally.judged == 4
    assert not tally.differences


def test_what_cannot_be_done_here_is_no_step_of_a_program() -> None:
    assert not can(Invpcid(0, 0, 0, 0, 0), 0)
    assert not can(Move(0, 0, "cr4", 1 << 17), 0)
    assert can(Move(0, 0, "cr4", 1 << 20), 1 << 20)


def test_an_initramfs_has_the_format_of_newc() -> None:
    archive = linux.initramfs({"init": b"#!", "a.ko": b"12345"})
    assert archive[:6] == b"070701"
    assert archive.count(b"070701") == 3
    assert len(archive) % 4 == 0
    # The name begins after 110 bytes, the data at the next multiple of 4.
    assert archive[110:115] == b"init\0"
    assert archive[116:118] == b"#!"
    assert b"TRAILER!!!\0" in archive
