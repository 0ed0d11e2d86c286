"""Our guest on QEMU and Bochs: cases written by hand in every paging mode, bounded random runs, the
known departures, and what happens when a machine is killed, hangs, or is given a bad record.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from vapama import oracle_batches, oracle_runs
from vapama.case import BadInput
from vapama.oracles import departures, native
from vapama.oracles import machine as machines
from vapama.oracles.bare_metal import BareMetal
from vapama.oracles.bochs import bochs
from vapama.oracles.departures import Disagreement, named
from vapama.oracles.emulator import CannotStart, MachineDied
from vapama.oracles.qemu import qemu
from vapama.spec import domains, nested, npt, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import (
    AC,
    LA57,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PKE,
    PSE,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    WP,
)
from vapama.spec.cpu import Cpu as State
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import (
    RSVD,
    EptMisconfiguration,
    EptViolation,
    I,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.paging import translate
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.subject import NotCovered, agree
from vapama.subjects import load_subject

MAKERS = {"qemu": qemu, "bochs": bochs}
ADDRESS = 0x1234_5678_9ABC
LINEAR_32 = 0x1234_5ABC
RW, USER_RW, USER_RO, LARGE = 0x3, 0x7, 0x5, 0x80
READ, WRITE, FETCH = (0, 0), (1, 0), (0, 1)


def started(name: str) -> BareMetal:
    """The machine of this name; skips the test if this host cannot run it."""
    try:
        return MAKERS[name]()
    except CannotStart as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module", params=list(MAKERS))
def subject(request: pytest.FixtureRequest) -> Iterator[BareMetal]:
    made = started(request.param)
    yield made
    made.machine.end()


@pytest.fixture(scope="module")
def on_qemu() -> Iterator[BareMetal]:
    made = started("qemu")
    yield made
    made.machine.end()


class Mode(NamedTuple):
    """A paging mode by the state, and tables in which each entry but the last is the next's."""

    name: str
    cr4: int
    efer: int
    shifts: tuple[int, ...]
    size: int = 8
    address: int = ADDRESS


MODES = (
    Mode("4-level", PAE, LME | LMA | NXE, (39, 30, 21, 12)),
    Mode("5-level", PAE | LA57, LME | LMA | NXE, (48, 39, 30, 21, 12)),
    Mode("PAE", PAE, NXE, (21, 12), address=LINEAR_32),
    Mode("32-bit", PSE, 0, (22, 12), 4, LINEAR_32),
)


def case(subject: BareMetal, mode: Mode, leaf: int, upper: int = USER_RW) -> tuple[State, Sparse]:
    """A state of the mode and tables from 0x1000 up, in which `leaf` is the entry of the PTE."""
    features = subject.machine.features
    state = State(
        cr0=PG | PE | WP,
        cr3=0x1000,
        cr4=mode.cr4,
        efer=mode.efer,
        maxphyaddr=features.maxphyaddr,
        pdptes=(0x1001, 0, 0, 0) if mode.name == "PAE" else None,
    )
    entries: dict[int, int] = {}
    for step, shift in enumerate(mode.shifts):
        table = 0x1000 * (step + 1)
        if mode.name == "PAE":
            state = state._replace(pdptes=(0x2001, 0, 0, 0))
            table += 0x1000
        mask = 0x3FF if mode.size == 4 else 0x1FF
        where = table | (mode.address >> shift & mask) * mode.size
        value = leaf if step == len(mode.shifts) - 1 else table + 0x1000 | upper
        entries[where & ~7] = entries.get(where & ~7, 0) | value << 8 * (where & 7)
    return state, Sparse(entries, machines.SERVER)


def asked(subject: BareMetal, state: State, memory: Sparse, access: Access) -> Outcome:
    """What the machine says; it must be what the reference says, or a known departure."""
    expected = translate(state, memory, access)
    outcome = subject.translate(state, memory, access)
    if not agree(expected, outcome, memory, subject.capabilities):
        assert subject.departure(state, memory, access, expected, outcome) is not None
    return outcome


# EVERY MODE


@pytest.mark.parametrize("user", [0, 1], ids=["supervisor", "user"])
@pytest.mark.parametrize("what", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_an_access_goes_to_its_page_and_marks_the_entries(
    subject: BareMetal, mode: Mode, what: tuple[int, int], user: int
) -> None:
    if mode.cr4 & ~subject.machine.cr4:
        pytest.skip(f"{subject.machine.name} has no {mode.name} paging")
    state, memory = case(subject, mode, 0x8000 | USER_RW)
    outcome = asked(subject, state, memory, Access(mode.address, *what, user))
    assert isinstance(outcome, Translated)
    assert hex(outcome.pa) == hex(0x8000 | mode.address & 0xFFF)
    assert len(outcome.updates) == len(mode.shifts)


@pytest.mark.parametrize("user", [0, 1], ids=["supervisor", "user"])
@pytest.mark.parametrize("what", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_a_missing_page_faults_with_the_code_of_the_access(
    subject: BareMetal, mode: Mode, what: tuple[int, int], user: int
) -> None:
    if mode.cr4 & ~subject.machine.cr4:
        pytest.skip(f"{subject.machine.name} has no {mode.name} paging")
    state, memory = case(subject, mode, 0)
    outcome = asked(subject, state, memory, Access(mode.address, *what, user))
    fetch = what[1] * (mode.name != "32-bit")
    assert isinstance(outcome, PageFault)
    assert outcome.error_code == what[0] * W | user * U | fetch * I


@pytest.mark.parametrize(
    ("more", "leaf", "access", "code"),
    [
        ({"cr4": PAE | SMEP}, USER_RW, Access(ADDRESS, fetch=1), P | I),
        ({"cr4": PAE | SMAP}, USER_RW, Access(ADDRESS), P),
        ({"cr4": PAE | SMAP, "rflags": AC | RFLAGS_ONE}, USER_RW, Access(ADDRESS), None),
        ({}, USER_RO, Access(ADDRESS, write=1), P | W),
        ({"cr0": PG | PE}, USER_RO, Access(ADDRESS, write=1), None),
        ({}, RW, Access(ADDRESS, user=1), P | U),
        ({}, USER_RW | 1 << 63, Access(ADDRESS, fetch=1, user=1), P | U | I),
    ],
    ids=["SMEP", "SMAP", "SMAP lifted", "read-only", "WP=0", "supervisor page", "XD"],
)
def test_rights_are_the_machine_s_own(
    subject: BareMetal, more: dict[str, Any], leaf: int, access: Access, code: int | None
) -> None:
    state, memory = case(subject, MODES[0], 0x8000 | leaf)
    outcome = asked(subject, state._replace(**more), memory, access)
    if code is None:
        assert isinstance(outcome, Translated)
    else:
        assert isinstance(outcome, PageFault)
        assert outcome.error_code == code


def test_a_non_canonical_address_is_refused(subject: BareMetal) -> None:
    state, memory = case(subject, MODES[0], 0)
    access = Access(1 << 47)
    assert asked(subject, state, Sparse({}, memory.limit), access) == NonCanonical()


def test_without_paging_an_address_is_physical(subject: BareMetal) -> None:
    state, _ = case(subject, MODES[3], 0)
    memory = Sparse({}, machines.SERVER)
    outcome = asked(subject, state._replace(cr0=PE), memory, Access(0x12_3456, write=1))
    assert outcome == Translated(0x12_3456, 0, ())


# RANDOM CASES


def test_random_cases_of_every_mode_agree_or_are_known(subject: BareMetal) -> None:
    tally = oracle_runs.run(subject, 4_000, seed=1)
    assert tally.differences == []
    assert tally.judged >= 4_000
    modes = {mode for mode, _ in tally.agreed}
    expected = {"no paging", "32-bit paging", "PAE paging", "4-level paging"}
    second = "NPT" if subject.machine.features.svm else "EPT"
    expected |= {second, f"4-level paging under {second}"}
    expected |= {"5-level paging"} if subject.machine.cr4 & LA57 else set()
    assert modes >= expected
    assert {kind for _, kind in tally.agreed} >= {"translated", "page fault"}


def test_a_mistaken_reference_is_found_out(
    on_qemu: BareMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(state: State, memory: Sparse, access: Access) -> Outcome:
        return translate(state._replace(cr4=state.cr4 & ~SMEP), memory, access)

    monkeypatch.setattr(oracle_runs, "translate", mistaken)
    tally = oracle_runs.run(on_qemu, 2_000, seed=1)
    assert tally.differences
    assert all(found.case.access.fetch for found in tally.differences)


def test_a_mistaken_walk_of_both_stages_is_found_out(
    subject: BareMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(gpa: int, write: int = 0, linear: int = 1) -> GuestPhysicalAccess:
        return GuestPhysicalAccess(gpa, write=write, linear=linear)  # as if it were no table

    monkeypatch.setattr(nested, "access_to_table", mistaken)
    tally = oracle_runs.run(subject, 1_500, seed=1)
    assert tally.differences
    assert all(" under " in found.case.mode for found in tally.differences)


@pytest.mark.parametrize("name", ["qemu,maxphyaddr=52", "bochs,model=ryzen"])
def test_nested_tables_of_other_hosts_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        machine = load_subject(name).subject
    except BadInput as why:
        pytest.skip(str(why))
    hosts = {"NPT", "NPT, PAE host"} | ({"NPT of 5 levels"} if "qemu" in name else set())
    try:
        tally = oracle_runs.run(machine, 3_000, seed=6)
        assert not tally.differences, oracle_runs.as_json(tally)
        assert hosts <= {mode for mode, _ in tally.agreed}
        # As if PDPTEs of PAE paging had rights.
        monkeypatch.setattr(npt, "has_rights", lambda host, level: True)
        found = oracle_runs.run(machine, 1_500, seed=6).differences
        assert {difference.case.mode for difference in found} == {"NPT, PAE host"}
    finally:
        machine.machine.end()


# DEPARTURES


def test_every_departure_of_this_machine_is_still_there(subject: BareMetal) -> None:
    tally = oracle_runs.run(subject, 6_000, seed=2)
    rare = {departures.BIT_12_IS_IGNORED.name}  # has a test of its own
    gone = {departure.name for departure in subject.departures} - set(tally.known) - rare
    assert not gone, f"{subject.machine.name} does not depart any more by {gone}: drop the entries"


def test_a_nested_pdpte_may_be_a_pde_too(on_qemu: BareMetal) -> None:
    host, entry = Npt(0x1C60, PAE, efer=0, maxphyaddr=40), 0x1F5F
    access = GuestPhysicalAccess(0xB1D8_E6DE, fetch=1)
    memory = Sparse({0x1C70: entry}, machines.SERVER)
    asked = oracle_runs.second_stage_case(host, memory, access, on_qemu)
    (careless,) = asked.departing.values()
    # As a PDE it keeps the bits that are reserved in it as the PDPTE: U/S is one.
    assert isinstance(careless, Translated)
    tally = oracle_runs.Tally()
    oracle_runs.give(on_qemu, [asked])
    for of_case, result in oracle_runs.finish(on_qemu, [asked], tally):
        oracle_runs.judge(on_qemu, of_case, result, tally)
    assert dict(tally.known) == {departures.PDPTE_IS_CARELESS.name: 1}, tally


def test_bochs_takes_pkru_for_supervisor_pages_still(subject: BareMetal) -> None:
    if subject.machine.name != "bochs":
        pytest.skip("about Bochs")
    state, memory = case(subject, MODES[0], 0x8000 | RW | 1 << 59)
    denied = state._replace(cr4=PAE | PKE, pkru=0b1000)
    assert isinstance(translate(denied, memory, Access(ADDRESS, write=1)), Translated)
    subject.machine.avoid = 0
    try:
        outcome = subject.translate(denied, memory, Access(ADDRESS, write=1))
    finally:
        subject.machine.avoid = PKE
    assert isinstance(outcome, PageFault), "it is mended: let Bochs be asked about CR4.PKE"


def test_bochs_ignores_bit_12_of_a_large_ept_page_still(subject: BareMetal) -> None:
    if not subject.machine.features.vmx:
        pytest.skip("about EPT")
    stage, memory, gpa = second_stage_of(subject, 0x8000 | 7)
    where = list(memory.touched)[2]
    memory.touched[where] = 0x40_1000 | 7 | 6 << 3 | LARGE
    access = GuestPhysicalAccess(gpa)
    assert isinstance(second_stage.translate(stage, memory, access), EptMisconfiguration)
    outcome = subject.second_stage(stage, memory, access)
    assert isinstance(outcome, Translated), "it is mended: drop BIT_12_IS_IGNORED"


def test_a_fetch_that_would_run_on_by_a_departure_is_not_asked(subject: BareMetal) -> None:
    if not subject.machine.features.vmx:
        pytest.skip("about EPT")
    stage, memory, gpa = second_stage_of(subject, 0x8000 | 7)
    where = list(memory.touched)[2]
    access = GuestPhysicalAccess(gpa, fetch=1)
    for frame, is_asked in ((0x40_0000, True), (machines.RAM_BYTES, False)):
        memory.touched[where] = frame | 1 << 12 | 7 | 6 << 3 | LARGE
        assert isinstance(second_stage.translate(stage, memory, access), EptMisconfiguration)
        with contextlib.nullcontext() if is_asked else pytest.raises(NotCovered, match="no RAM"):
            oracle_runs.second_stage_case(stage, memory, access, subject)


def disagreement(
    subject: BareMetal, expected: Outcome, observed: Outcome, memory: Sparse
) -> Disagreement:
    return Disagreement(memory, expected, observed, subject.capabilities, 8, U)


def test_a_departure_excuses_nothing_else(on_qemu: BareMetal) -> None:
    entry = 0x8000 | USER_RW | LARGE | 1 << 13
    memory = Sparse({0x1000: entry, 0x2000: 0x3007}, machines.SERVER)
    right = PageFault(P | U | RSVD, (Update(0x2000, 0x20),))
    short = PageFault(U | RSVD, (Update(0x2000, 0x20),))
    marked = replace(short, may_update=(Update(0x2000, 0x20), Update(0x1000, 0x20)))
    outside = OutsideMemory(0x4_0000_0000)

    def name(expected: Outcome, observed: Outcome) -> str | None:
        return named(departures.QEMU, disagreement(on_qemu, expected, observed, memory))

    assert name(right, short) == "reserved-bit-fault-lacks-p"
    assert name(right, marked) == "reserved-large-page-is-marked-accessed"
    assert name(outside, PageFault(U)) == "table-outside-memory-reads-0"
    assert name(right, replace(short, error_code=RSVD)) is None
    assert name(PageFault(P | U), PageFault(U)) is None
    assert name(right, replace(marked, may_update=(Update(0x1000, 0x60),))) is None
    assert name(outside, PageFault(U | W)) is None
    assert name(outside, PageFault(U, (Update(0x1000, 0x20),))) is None
    assert name(Translated(0x8000, 1, ()), short) is None


# BAD RECORDS, HANGS AND DEATHS


def test_bits_that_the_processor_lacks_are_refused(subject: BareMetal) -> None:
    state, memory = case(subject, MODES[0], 0x8000 | USER_RW)
    with pytest.raises(NotCovered, match="no CR4 bits 0x800000"):
        subject.translate(state._replace(cr4=PAE | 1 << 23), memory, Access(ADDRESS))


def test_a_bad_record_is_reported_and_stops_nothing(subject: BareMetal) -> None:
    if subject.machine.name != "bochs":
        pytest.skip("QEMU 7.2 does not come out of a MOV to CR3 or CR4 with a reserved bit")
    state, memory = case(subject, MODES[0], 0x8000 | USER_RW)
    asked = native.ask(state, memory, Access(ADDRESS), subject.machine)
    bad = bytearray(asked.record)
    bad[0x28:0x30] = (1 << 63 | PAE).to_bytes(8, "little")  # CR4
    result = subject.machine.run(asked.flavor, bytes(bad) + asked.record, len(bad))
    with pytest.raises(RuntimeError, match="something other than the access"):
        native.observed(asked, result[: len(bad)], memory.touched)
    good = native.observed(asked, result[len(bad) :], memory.touched)
    assert isinstance(good, Translated)


def endless(subject: BareMetal) -> native.Ask:
    """A record that the machine never ends: without paging it runs on where there is no RAM."""
    state, _ = case(subject, MODES[3], 0)
    memory = Sparse({}, machines.SERVER)
    asked = native.ask(state._replace(cr0=PE), memory, Access(0x1000, fetch=1), subject.machine)
    record = bytearray(asked.record)
    record[8:16] = (0x4000_0000).to_bytes(8, "little")
    return asked._replace(record=bytes(record))


def test_a_case_that_hangs_is_named_and_the_others_are_judged(
    on_qemu: BareMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_qemu.machine, "patience", 0.5)
    tally = oracle_runs.Tally()
    state, _ = case(on_qemu, MODES[3], 0)
    state, memory = state._replace(cr0=PE), Sparse({}, machines.SERVER)
    access = Access(0x1000, fetch=1)
    good = native.ask(state, memory, access, on_qemu.machine)
    expected = translate(state, memory, access)
    batch = [
        oracle_runs.Drawn(
            mode=name,
            state=state,
            memory=memory,
            access=access,
            expected=expected,
            flavor=ask.flavor,
            record=ask.record,
            observed=lambda result: native.observed(good, result, {}),
            entry_bytes=8,
            describing=I,
            reference=lambda other: expected,
        )
        for name, ask in (("good", good), ("endless", endless(on_qemu)), ("good", good))
    ]
    oracle_runs.give(on_qemu, batch)
    for drawn, result in oracle_runs.finish(on_qemu, batch, tally):
        oracle_runs.judge(on_qemu, drawn, result, tally)
    assert tally.agreed.total() == 2
    (found,) = tally.differences
    assert found.case.mode == "endless"
    assert "hung" in str(found.observed)
    assert tally.deaths == 2


def test_a_machine_killed_in_the_middle_of_a_run_loses_nothing(subject: BareMetal) -> None:
    killed: list[tuple[int, int]] = []

    def kill_once(tally: oracle_runs.Tally) -> None:
        if not killed:
            killed.append((tally.judged, subject.machine.pid))
            os.kill(subject.machine.pid, signal.SIGKILL)

    tally = oracle_runs.run(subject, 5_000, seed=3, progress=kill_once)
    assert killed[0][0] > 0
    assert tally.deaths == 1
    assert tally.judged >= 5_000
    assert tally.differences == []


def test_a_machine_that_died_is_reported_and_started_anew(on_qemu: BareMetal) -> None:
    state, memory = case(on_qemu, MODES[0], 0x8000 | USER_RW)
    on_qemu.machine.give(machines.LEGACY, endless(on_qemu).record, native.RECORD_BYTES)
    os.kill(on_qemu.machine.pid, signal.SIGKILL)
    with pytest.raises(MachineDied, match="ended"):
        on_qemu.machine.await_finish()
    outcome = on_qemu.translate(state, memory, Access(ADDRESS))
    assert isinstance(outcome, Translated)


def test_nothing_is_left_of_a_machine_that_was_ended() -> None:
    made = started("qemu")
    pid, folder = made.machine.pid, made.machine.folder
    made.machine.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    del made
    assert not folder.exists()


# SECOND STAGES


def second_stage_of(subject: BareMetal, leaf: int) -> tuple[Stage, Sparse, int]:
    """EPT or nested page tables from 0x1000 up, in which `leaf` has the rights of the last entry
    for the address given, 7 being all.
    """
    gpa, width = 0x12_3456_7ABC, subject.machine.features.maxphyaddr
    stage: Stage
    if subject.machine.features.vmx:
        caps = subject.machine.ept_capabilities & domains.EPT_CAPABILITY.free
        caps |= domains.EPT_CAPABILITY.fixed
        stage = Ept(0x1000 | 0x5E, width, capabilities=caps)
        leaf |= 6 << 3 if leaf & 7 else 0
    else:
        stage = Npt(0x1000, maxphyaddr=width)
    shifts = (39, 30, 21, 12)
    entries = {}
    for step, shift in enumerate(shifts):
        table = 0x1000 * (step + 1)
        entries[table | (gpa >> shift & 0x1FF) << 3] = table + 0x1000 | 7 if step < 3 else leaf
    return stage, Sparse(entries, machines.SERVER), gpa


@pytest.mark.parametrize("user", [0, 1], ids=["supervisor page", "user page"])
@pytest.mark.parametrize("what", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
def test_a_guest_physical_address_goes_to_its_page(
    subject: BareMetal, what: tuple[int, int], user: int
) -> None:
    stage, memory, gpa = second_stage_of(subject, 0x8000 | 7)
    access = GuestPhysicalAccess(gpa, *what, user)
    outcome = subject.second_stage(stage, memory, access)
    expected = second_stage.translate(stage, memory, access)
    assert isinstance(outcome, Translated)
    assert hex(outcome.pa) == hex(0x8ABC)
    assert len(outcome.updates) == 4
    assert agree(expected, outcome, memory, subject.capabilities)


@pytest.mark.parametrize("leaf", [0, 0x8000 | 5], ids=["not present", "read-only"])
def test_a_second_stage_that_forbids_a_write_exits(subject: BareMetal, leaf: int) -> None:
    stage, memory, gpa = second_stage_of(subject, leaf)
    access = GuestPhysicalAccess(gpa, write=1)
    outcome = subject.second_stage(stage, memory, access)
    assert isinstance(outcome, EptViolation | NestedPageFault)
    assert outcome.gpa == gpa
    expected = second_stage.translate(stage, memory, access)
    assert agree(expected, outcome, memory, subject.capabilities)


def test_what_the_guest_does_not_do_to_its_page_is_not_covered(subject: BareMetal) -> None:
    stage, memory, gpa = second_stage_of(subject, 0x8000 | 7)
    for odd in (
        GuestPhysicalAccess(gpa, table=1),
        GuestPhysicalAccess(gpa, shadow_stack=1),
        GuestPhysicalAccess(1 << 51),
    ):
        with pytest.raises(NotCovered):
            subject.second_stage(stage, memory, odd)


# COMPILED BATCHES


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle_batches, "BATCH", 1_000)
    monkeypatch.setattr(oracle_batches, "SAMPLE", 20)


@pytest.mark.usefixtures("small_batches")
def test_compiled_batches_agree_and_a_sample_is_judged_again(subject: BareMetal) -> None:
    tally = oracle_batches.run(subject, 4_000, seed=1)
    assert tally.differences == []
    assert tally.judged >= 4_000
    assert tally.sampled > 40
    assert {kind for _, kind in tally.agreed} == {
        "translated",
        "page fault",
        "non-canonical address",
    }


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        pytest.param(12, 1 << 2, id="error code"),
        pytest.param(13, 1 << 12, id="CR2"),
        pytest.param(14, 1 << 9, id="physical address"),
        pytest.param(19, 1 << 6, id="a flag too many"),
        pytest.param(11, 1 << 4, id="vector"),
    ],
)
def test_compiled_batches_find_out_a_machine_that_does_wrong(
    on_qemu: BareMetal, monkeypatch: pytest.MonkeyPatch, word: int, wrong: int
) -> None:
    finish = oracle_batches.Batches.finish

    def mistaken(self: oracle_batches.Batches, batch: oracle_batches.Batch) -> Any:
        results = finish(self, batch).copy()
        results[::10, word] ^= wrong
        return results

    monkeypatch.setattr(oracle_batches.Batches, "finish", mistaken)
    tally = oracle_batches.run(on_qemu, 1_000, seed=1)
    assert tally.differences


@pytest.mark.usefixtures("small_batches")
def test_a_machine_killed_under_compiled_batches_loses_nothing(on_qemu: BareMetal) -> None:
    killed: list[int] = []

    def kill_once(tally: oracle_runs.Tally) -> None:
        if not killed:
            killed.append(tally.judged)
            os.kill(on_qemu.machine.pid, signal.SIGKILL)

    tally = oracle_batches.run(on_qemu, 4_000, seed=2, progress=kill_once)
    assert killed[0] > 0
    assert tally.deaths == 1
    assert tally.judged >= 4_000
    assert tally.differences == []
