"""Invariants of shadow pages and flushes, by the model in `spec.coherence`: any number of steps.

A state is drawn as functions of words at the places that the claim asks for. What is assumed of it
is `Model.truths` of the reader, the SPTE and the page that the step is about, and of the ones that
it is then shown of, which are any. So by induction it holds of all of them after any number of
steps: at power-on everything is 0, and every step keeps it.
"""

from collections.abc import Callable
from typing import Any

from vapama.spec.coherence import (
    DIRECT,
    DUE,
    LOGGED,
    ROM,
    UNSYNC,
    WRITTEN,
    justified,
    named,
    naming,
)
from vapama.spec.domains import Domain
from vapama.spec.maps import Drawn
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.paging import ACCESSED, DIRTY, EXECUTE_DISABLE, FRAME, PRESENT, USER, WRITABLE
from vapama.spec.subject import VIEW, VMM
from vapama.spec.words import Condition, Word, low_bits

SOURCE = "Linux, virt/kvm/x86/mmu.rst and virt/kvm/locking.rst; Intel SDM Vol. 3A, 4.10"
SEARCHING = ("exhaustive", "random", "hypothesis", "atheris")
"""Of a thousand states at random four hold: programs on the shipped code are for these engines."""
RIGHTS = PRESENT | WRITABLE | USER | EXECUTE_DISABLE


def _few(free: Word, fixed: Word = 0) -> Domain:
    """Any of these bits, mostly of frames 0 and 1 and with rights."""

    def bias(raw: int) -> Word:
        return (raw >> 8 & 1) << 12 & free | (raw >> 16 & 0xFF | raw >> 24 & 0xFF | fixed) & free

    return Domain(free=free, fixed=fixed, bias=bias, scope=(fixed,))


FRAMES = Domain(free=low_bits(40), bias=lambda raw: raw >> 8 & 1, scope=(0, 1))
NAME = Domain(bias=lambda raw: raw >> 8 & 1, scope=(0, 1))
ONE = Domain(free=1)
GUEST_ENTRY = _few(FRAME | RIGHTS | ACCESSED | DIRTY)
OF = {
    "content": GUEST_ENTRY,
    "source": GUEST_ENTRY,
    "cached_source": GUEST_ENTRY,
    "table": _few(FRAME | PRESENT | UNSYNC | DIRECT | ROM | 7 << 4),
    "spte": _few(FRAME | RIGHTS),
    "cached": _few(FRAME | RIGHTS),
    "maps": _few(FRAME | PRESENT),
    "cached_for": _few(FRAME | PRESENT),
    "frame": _few(FRAME | PRESENT | WRITABLE),
    "owner": _few(FRAME | PRESENT),
    "log": Domain(free=LOGGED | WRITTEN | DUE),
    "ready": ONE,
    "past": ONE,
}
"""What the words of each map may be."""


ACTING = (("core", NAME), ("at page", NAME), ("at place", NAME))
SHOWN = (("reader", NAME), ("page", NAME), ("place", NAME), ("other", NAME))
OPERANDS = (("gfn", FRAMES), ("where", NAME), ("value", GUEST_ENTRY))
ENTRY, PAGE, HOST = OF["spte"], OF["table"], OF["frame"]


class State:
    """Any state of the model that holds, as far as it is asked about, and a step in it."""

    def __init__(self, nondet: Nondet, subject: Any) -> None:
        self.core, self.at, self.index = nondet.words(ACTING)
        self.shown = nondet.words(SHOWN)
        self.gfn, self.where, self.value = nondet.words(OPERANDS)
        reader, page, place, other = self.shown
        self.nondet = nondet
        self.model = subject.coherence().Model(
            lambda name: Drawn(nondet, name, OF[name]),
            owed=nondet.flag("owed"),
            readers=(reader, self.core),
            entries=((page, place), (self.at, self.index)),
            pages=(page, self.at, other),
        )
        nondet.assume(self.holds())

    def holds(self) -> Condition:
        """What is assumed: of what is shown, and of what acts, with each page that is named."""
        model, (reader, page, place, _) = self.model, self.shown
        holds: Condition = model.owns(self.gfn)
        for about in ((reader, page, place), (self.core, self.at, self.index)):
            for other in model.pages:
                for _, truth in model.truths(*about, other):
                    holds = holds & truth
        return holds


STEPS: dict[str, Callable[[State], Condition]] = {
    "power-on": lambda s: s.model.power_on(),
    "an SPTE is set": lambda s: s.model.set_spte(
        s.at, s.index, s.nondet.word("spte", ENTRY), s.gfn
    ),
    "a flush is requested": lambda s: s.model.request_flush(),
    "a shadow page is made": lambda s: s.model.shadow(s.at, s.nondet.word("stands for", PAGE)),
    "a shadow page is freed": lambda s: s.model.unshadow(s.at),
    "a page goes unsync": lambda s: s.model.unsync(s.at),
    "a page is synced": lambda s: s.model.synced(s.at),
    "a store is emulated": lambda s: s.model.store_for_guest(s.gfn, s.where, s.value),
    "flags are set": lambda s: s.model.set_flags(s.gfn, s.where, s.value),
    "the host remaps": lambda s: s.model.remap(s.gfn, s.nondet.word("to", HOST)),
    "a write is logged": lambda s: s.model.log_written(s.gfn),
    "a log begins": lambda s: s.model.begin_log(s.gfn),
    "a frame is protected": lambda s: s.model.protected(s.gfn),
    "a log ends": lambda s: s.model.end_log(s.gfn),
    "a core flushes": lambda s: s.model.enter(s.core),
    "a core fills": lambda s: s.model.fill(s.core, s.at, s.index),
    "a core stores": lambda s: s.model.store(s.core, s.at, s.index, s.where, s.value),
    "a core invalidates": lambda s: s.model.invalidate(s.core, s.at, s.index),
}


@invariant(
    source=SOURCE,
    reaches=tuple(STEPS),
    needs=(VMM, VIEW),
    twin="the-host-remaps-before-the-flush",
    bound="entries of the last level, CR0.WP = 1",
    unsuited=SEARCHING,
    in_parts=True,
)
def every_step_keeps_shadow_pages_coherent(nondet: Nondet, subject: Any) -> None:
    """Whatever the state that holds, after a step that the rules allow every SPTE, and all that a
    core may still use, leads where the host has the guest's frame, writes to no table that is kept
    true and nothing unlogged, and is what the guest's entry said since the last invalidation.
    """
    state = State(nondet, subject)
    step = nondet.one_of("step", list(STEPS))
    nondet.assume(STEPS[step](state))
    nondet.reach(step)
    for broken, truth in state.model.truths(*state.shown):
        assert truth, f"{step}, and then {broken}"


@invariant(
    source="Intel SDM Vol. 3A, 4.10.4; Linux, virt/kvm/x86/mmu.rst",
    reaches=("unsync", "kept true", "direct"),
    needs=(VMM, VIEW),
    twin="invlpg-does-not-compare-an-unsync-entry",
    bound="entries of the last level, CR0.WP = 1",
    unsuited=SEARCHING,
)
def after_invlpg_a_core_uses_what_the_guest_says_now(nondet: Nondet, subject: Any) -> None:
    """What a core caches after INVLPG is given by the guest's entry as it is, and is where the host
    has the guest's frame, whose owner is no other.
    """
    state = State(nondet, subject)
    model, (reader, page, place, _) = state.model, state.shown
    nondet.assume(model.invalidate(reader, page, place))
    nondet.assume(model.fill(reader, page, place))
    table, cached = model.table(page), model.cached(reader, page, place)
    gfn = named(model.cached_for(reader, page, place))
    entry = model.entry_of(page, place)
    nondet.reach("direct" if table & DIRECT else "unsync" if table & UNSYNC else "kept true")
    assert justified(table, entry, gfn, cached), "the guest's entry does not give it"
    assert model.owner(named(cached)) == naming(gfn), "the frame is another's"
    assert (cached & WRITABLE == 0) | (model.frame(gfn) & WRITABLE != 0), "the host forbids it"
