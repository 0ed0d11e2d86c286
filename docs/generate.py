# ruff: noqa: INP001  (a script, found by its path)
"""``python docs/generate.py`` writes reference/invariants.md from the registry of invariants,
reference/vector-coverage.md from the test vectors that come with vapama,
reference/audit-rules.md from the rules of an audit, and reference/hunts.md from the record of hunts
beside it.

A test says whether the pages are up to date.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from vapama.bugs.mistakes import MISTAKES
from vapama.hunting import Hunt, Record, read_record
from vapama.snapshot.findings import RULES
from vapama.spec.nondet import Invariant, load_invariants
from vapama.vectors.form import SHIPPED, read_vectors
from vapama.vectors.questions import KINDS

PAGE = Path(__file__).parent / "reference" / "invariants.md"
HEAD = """\
<!-- Written by docs/generate.py from spec/invariants/: change it there. -->

# The invariants

Each is one function under `spec/invariants/` that draws any control state, any memory and any
access, and asks the subject. The name is the claim; `vapama check NAME` checks it, `vapama prove
NAME` proves it of the optimized walk.

- *source*: the section of the manual that the claim follows.
- *reaches*: the situations that a check must have come by, or it does not count.
- *needs*: what a subject must observe ([subjects](subjects.md)); without it the invariant is not
  applicable. One that needs nothing compares kinds of outcome, and what else is observed.
- *twin*: the seeded mistake (`vapama list --mistakes`) that the claim must be seen to refute.
- *bound*: what a proof does not range over. Without one it is for all inputs.
- *rests on*: the lemmas that a proof uses; it counts only if they are proved too.
- *searched*: why the claim is searched only, and not proved. Without it there is a proof.
- *not run by*: engines whose scope holds too little of it to say something.
"""


VECTORS_PAGE = PAGE.with_name("vector-coverage.md")
VECTORS_HEAD = """\
<!-- Written by docs/generate.py from vapama/data/vectors.jsonl: change it there. -->

# What the test vectors reach

For each kind of [test vector](vectors.md) that comes with vapama, how its walks go and end, and how
many vectors do so. The paths that the symbolic engine enumerates in the walks of one stage are all
taken: `tests/cli/test_vectors.py` evaluates their conditions on the vectors. Of two stages together
there are too many for that. There a guest's walk goes and ends in each way of its own; and at each
place where the second stage is walked (each table of the guest, each update of its flags, the page)
that walk goes and ends in each way that it does alone.
"""


AUDIT_PAGE = PAGE.with_name("audit-rules.md")
AUDIT_HEAD = """\
<!-- Written by docs/generate.py from vapama/snapshot/findings.py: change it there. -->

# The rules of an audit

What `vapama snapshot audit` ([how to](../how-to/audit-a-hypervisor.md)) holds a hypervisor's tables
against. *Number* is the rule's among those of [the hypervisor's
memory](../explanation/hypervisor.md#the-rules-of-the-tables); where there is none, it is the
manual's. `tests/cli/test_audit.py` has a fault for each that it is seen to find.

| rule | what it says | number | not so is a |
| --- | --- | --- | --- |
"""


HUNTS_PAGE = PAGE.with_name("hunts.md")
RECORD = PAGE.with_name("hunts.json")
EXPLAINED = PAGE.parents[1] / "explanation" / "hypervisor.md"
HUNTS_HEAD = """\
<!-- Written by docs/generate.py from hunts.json, which `vapama bugs` writes: hunt again. -->

# Who finds the mistakes of a hypervisor

Each mistake is a small patch of `impl/` (`bugs/*.mistakes`). It was hunted on its own, with fixed
seeds, until it was found. The seconds are those until then, Hypothesis' own shrinking included, on
a machine that had other work at the same time ({machine}). *Not by* names engines that did not find
it in the time they had: Hypothesis in the 2,000 examples of the standard budget. The steps are
those of the shortest program that it was shrunk to.

```console not-run
$ vapama bugs --engines random,hypothesis,exhaustive --record docs/reference/hunts.json --new
$ python docs/generate.py
```
"""


def main() -> None:
    """Write the pages."""
    HUNTS_PAGE.write_text(hunts_page(read_record(RECORD)), encoding="utf-8")
    AUDIT_PAGE.write_text(audit_page(), encoding="utf-8")
    PAGE.write_text(invariants_page(), encoding="utf-8")
    VECTORS_PAGE.write_text(vectors_page(), encoding="utf-8")


def audit_page() -> str:
    """The page about audits: a table of the rules."""
    return AUDIT_HEAD + "".join(
        f"| `{name}` | {rule.says} | {rule.number} | {rule.status} |\n"
        for name, rule in RULES.items()
    )


def hunts_page(record: Record) -> str:
    """The page about hunts: what breaks each rule of the tables, what guests see, real bugs."""
    of: dict[str, list[Hunt]] = {}
    for hunt in record.hunts:
        if hunt.mistake in MISTAKES:
            of.setdefault(hunt.mistake, []).append(hunt)
    parts = [HUNTS_HEAD.replace("{machine}", record.machine), "## By rule of the tables\n"]
    parts.append(
        "The rules are those of [the hypervisor's memory]"
        "(../explanation/hypervisor.md#the-rules-of-the-tables).\n"
    )
    parts.append("| rule | what it says | mistake | found by |\n| --- | --- | --- | --- |\n")
    told = set()
    for rule, says in rules_of_the_tables():
        breaking = {
            name: [hunt for hunt in hunts if rule in hunt.rules] for name, hunts in of.items()
        }
        start = f"| {rule} | {says} |"
        for name, hunts in breaking.items():
            if hunts:
                parts[-1] += f"{start} `{name}` | {_found(of[name], hunts)} |\n"
                start = "| | |"
                told.add(name)
        if start != "| | |":
            parts[-1] += f"{start} none yet | |\n"

    parts.append("## By what guests and hosts see\n")
    parts.append("| claim | mistake | found by |\n| --- | --- | --- |\n")
    for name, hunts in of.items():
        if name not in told and any(hunt.found for hunt in hunts):
            claim = MISTAKES[name].breaks.replace("_", " ")
            parts[-1] += f"| {claim} | `{name}` | {_found(hunts, hunts)} |\n"

    parts.append("## Made in real systems\n")
    parts.append("| where, and what | mistake | found by |\n| --- | --- | --- |\n")
    for name, hunts in of.items():
        if MISTAKES[name].story:
            parts[-1] += f"| {MISTAKES[name].story} | `{name}` | {_found(hunts, hunts)} |\n"

    missed = [name for name, hunts in of.items() if not any(hunt.found for hunt in hunts)]
    if missed:
        parts.append("## Not found\n")
        parts.append("".join(f"- `{name}`\n" for name in missed))
    return "\n".join(parts)


def rules_of_the_tables() -> list[tuple[int, str]]:
    """The numbers of the rules, in order, and what they say: out of the page that explains them."""
    rows = re.findall(
        r"^\| (\d[\d, ]*) \| (.*) \|$", EXPLAINED.read_text(encoding="utf-8"), re.MULTILINE
    )
    return sorted((int(n), says) for numbers, says in rows for n in numbers.split(","))


def _found(hunts: list[Hunt], that: list[Hunt]) -> str:
    """Who found a mistake, of `that` how, and who did not."""
    by = [f"{hunt.engine} {hunt.seconds:.2f} s" for hunt in that if hunt.found]
    steps = [hunt.steps for hunt in that if hunt.found and hunt.steps]
    missed = [hunt.engine for hunt in hunts if not hunt.found]
    text = ", ".join(by)
    if steps:
        text += f"; {min(steps)} steps" if min(steps) > 1 else "; 1 step"
    return text + (f"; not by {', '.join(missed)}" if missed else "")


def vectors_page() -> str:
    """The page about test vectors: a table of how the walks of each kind end."""
    counts: dict[str, Counter[str]] = {}
    for vector in read_vectors(SHIPPED):
        enumerated = KINDS[vector.kind].symbolic
        way = vector.path if enumerated else vector.path.rsplit(", ", 1)[1]
        counts.setdefault(vector.kind, Counter())[way] += 1
    parts = [VECTORS_HEAD]
    for kind, ways in counts.items():
        rows = "".join(f"| {way} | {ways[way]} |\n" for way in sorted(ways))
        title = f"## {kind[:1].upper()}{kind[1:]}"
        parts.append(
            f"{title}\n\n{ways.total():,} vectors.\n\n| path | vectors |\n| --- | ---: |\n{rows}"
        )
    return "\n".join(parts)


def invariants_page() -> str:
    """The page, as the registry has it: a section for each file, in the order of `vapama list`."""
    parts, module = [HEAD], ""
    for invariant in load_invariants().values():
        if invariant.claim.__module__ != module:
            module = invariant.claim.__module__
            parts.append(_file_heading(module))
        parts.append(_entry(invariant))
    return "\n".join(parts)


def _file_heading(module: str) -> str:
    file = module.removeprefix("vapama.").replace(".", "/")
    opening = (sys.modules[module].__doc__ or "").split("\n\n")[0]
    about = " ".join(opening.split()).removeprefix("Invariants of the 64-bit walk: ").rstrip(".")
    return f"## {about[:1].upper()}{about[1:]}\n\nIn `{file}.py`.\n"


def _entry(invariant: Invariant) -> str:
    claim = " ".join((invariant.claim.__doc__ or "").split())
    rows = {
        "source": invariant.source,
        "reaches": "; ".join(invariant.reaches),
        "needs": ", ".join(sorted(invariant.needs)),
        "twin": f"`{invariant.twin}`" if invariant.twin else "",
        "bound": invariant.bound,
        "rests on": ", ".join(f"`{name}`" for name in invariant.uses),
        "searched": invariant.searched,
        "not run by": ", ".join(invariant.unsuited),
        "proved of": "all natural numbers" if invariant.counts else "",
    }
    listed = "".join(f"- {name}: {value}\n" for name, value in rows.items() if value)
    return f"### {invariant.name}\n\n{claim}\n\n{listed}"


if __name__ == "__main__":
    main()
