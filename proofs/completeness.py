"""Path completeness: that the explored paths are all there are, checked from the outside.

The paths of an exploration, as lists of conditions, are put together into one formula that says:
whatever the inputs, they follow one of these paths (or break an assumption on the way), and every
obligation met on it holds. Its negation is given to a fresh solver, and as SMT-LIB text to a second
one. Nothing of the explorer's bookkeeping is believed: which paths it followed, which sides of a
branch it found impossible, which obligations met. What is believed are the conditions themselves,
and that those which its known bits or z3's simplifier decide need no path.
"""

import re
from collections.abc import Callable

import z3

from vapama.proofs.symbolic import (
    ASK,
    ASSUME,
    BRANCH,
    CHOICE,
    MUST,
    NotDeterministic,
    Path,
    same_terms,
)

PARTS, SMALL_PART = 16, 80
"""A formula of more obligations than the second is split, into parts of one in `PARTS` at most."""


def completeness(paths: list[Path]) -> z3.BoolRef:
    """The formula that is valid if `paths` leave nothing out.

    Raises `NotDeterministic` if the paths do not form a tree.
    """
    return _subtree(paths, 0, lambda path: path.failure is None)


def explored(paths: list[Path]) -> z3.BoolRef:
    """The same, whether they fail or not: that they are all there are, and obligations hold."""
    return _subtree(paths, 0, lambda path: True)


def _subtree(paths: list[Path], depth: int, holds: Callable[[Path], bool]) -> z3.BoolRef:
    """The formula for paths that agree on their first `depth` decisions."""
    ended = [path for path in paths if len(path.decisions) == depth]
    if ended:
        if len(paths) != 1:
            raise NotDeterministic("a path is the beginning of another")
        return z3.BoolVal(holds(ended[0]))
    kind, options, _ = paths[0].decisions[depth]
    ways: dict[int, list[Path]] = {}
    for path in paths:
        other_kind, other_options, taken = path.decisions[depth]
        if other_kind != kind or not same_terms(options, other_options):
            raise NotDeterministic(f"decision {depth} differs between paths")
        ways.setdefault(taken, []).append(path)
    below = {taken: _subtree(group, depth + 1, holds) for taken, group in ways.items()}
    nothing = z3.BoolVal(False)
    if kind == CHOICE:
        return z3.And(*(below.get(i, nothing) for i in range(len(options))))
    if kind == ASSUME:
        return z3.Implies(options[0], below.get(0, nothing))
    if kind == ASK:
        return below[1] if 1 in below else z3.And(options[0], below[0])
    if kind == MUST:
        return z3.And(options[0], below.get(0, nothing))
    assert kind == BRANCH
    return z3.If(options[0], below.get(0, nothing), below.get(1, nothing))


def parts(formula: z3.BoolRef) -> list[z3.BoolRef]:
    """Formulae that are all valid just if this one is: each for some of its paths.

    A solver that learns of all paths at once what it needs for one takes twice as long or more.
    There are not many, for each has to be told what leads to it.
    """
    sizes: dict[int, int] = {}
    most = max(SMALL_PART, _size(formula, sizes) // PARTS)
    if sizes[formula.get_id()] <= most:
        return [formula]
    return [
        # Not `z3.And` of one: bitwuzla does not read that.
        z3.Or(*map(z3.Not, given), part) if given else part
        for given, part in _split([], formula, most, sizes)
    ]


def _below(formula: z3.BoolRef) -> list[z3.BoolRef]:
    """What an implication, a choice or a conjunction leads to; empty if the formula is no such."""
    if z3.is_implies(formula):
        return [formula.arg(1)]
    if z3.is_app_of(formula, z3.Z3_OP_ITE):
        return [formula.arg(1), formula.arg(2)]
    return formula.children() if z3.is_and(formula) else []


def _size(formula: z3.BoolRef, sizes: dict[int, int]) -> int:
    """The number of obligations and dead ends, which is what a solver has to refute. Noted in
    `sizes` by z3's number of the term, for it and all below it.
    """
    number = formula.get_id()
    if number not in sizes:
        below = _below(formula)
        size = sum(_size(part, sizes) for part in below) if below else not z3.is_true(formula)
        sizes[number] = int(size)
    return sizes[number]


def _split(
    given: list[z3.BoolRef], formula: z3.BoolRef, most: int, sizes: dict[int, int]
) -> list[tuple[list[z3.BoolRef], z3.BoolRef]]:
    """The formula's parts of at most this size, if they can be had, and what leads to each."""
    below = _below(formula)
    if sizes[formula.get_id()] <= most or not below:
        return [] if z3.is_true(formula) else [(given, formula)]
    if z3.is_implies(formula):
        ways = [[formula.arg(0)]]
    elif z3.is_and(formula):
        ways = [[part for part in below[:at] if not _below(part)] for at in range(len(below))]
    else:
        ways = [[formula.arg(0)], [z3.Not(formula.arg(0))]]
    return [
        found
        for way, part in zip(ways, below, strict=True)
        for found in _split([*given, *way], part, most, sizes)
    ]


def smtlib(formula: z3.BoolRef, logic: str = "QF_AUFBV") -> str:
    """SMT-LIB text that is unsatisfiable just if `formula`, of this logic, is valid."""
    solver = z3.SolverFor("QF_ABV")
    solver.add(z3.Not(formula))
    text: str = solver.to_smt2()
    # bitwuzla has no equality of values of a sort that is not interpreted. They are only compared
    # and given to functions, so words will do: there are more of them than terms in a formula.
    text = re.sub(r"\(declare-sort (\S+) 0\)", r"(define-sort \1 () (_ BitVec 32))", text)
    return f"(set-logic {logic})\n" + text


def valid_by_z3(formula: z3.BoolRef, rlimit: int = 0) -> str:
    """By a fresh z3 solver: "valid", "not valid" or "unknown"."""
    solver = z3.SimpleSolver()
    if rlimit:
        solver.set("rlimit", rlimit)
    solver.add(z3.Not(formula))
    answer = solver.check()
    return "valid" if answer == z3.unsat else "not valid" if answer == z3.sat else "unknown"


def valid_by_bitwuzla(text: str, seconds: float = 0) -> str:
    """By bitwuzla, of SMT-LIB text made by `smtlib`: "valid", "not valid" or "unknown"."""
    import bitwuzla

    options = bitwuzla.Options()
    # z3 has simplified the terms. To do it again takes longest where it helps least: batches under
    # EPT take 21 s, and 5 s without; over the whole ledger it is 56 s against 37.
    options.set(bitwuzla.Option.PREPROCESS, 0)
    if seconds:
        options.set(bitwuzla.Option.TIME_LIMIT_PER, int(seconds * 1000))
    terms = bitwuzla.TermManager()
    parser = bitwuzla.Parser(terms, options)
    parser.parse(text.replace("(check-sat)", ""), True, False)
    answer = parser.bitwuzla().check_sat()
    if answer == bitwuzla.Result.UNSAT:
        return "valid"
    return "not valid" if answer == bitwuzla.Result.SAT else "unknown"


def valid_by_cvc5(text: str, seconds: float = 0) -> str:
    """By cvc5, of SMT-LIB text made by `smtlib`: "valid", "not valid" or "unknown"."""
    import cvc5

    solver = cvc5.Solver(cvc5.TermManager())
    if seconds:
        solver.setOption("tlimit-per", str(int(seconds * 1000)))
    parser = cvc5.InputParser(solver)
    parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, text.replace("(check-sat)", ""), "")
    command = parser.nextCommand()
    while not command.isNull():
        command.invoke(solver, parser.getSymbolManager())
        command = parser.nextCommand()
    answer = solver.checkSat()
    if answer.isUnsat():
        return "valid"
    return "not valid" if answer.isSat() else "unknown"
