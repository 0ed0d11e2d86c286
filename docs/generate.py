# ruff: noqa: INP001  (a script, found by its path)
"""``python docs/generate.py`` writes reference/invariants.md from the registry of invariants.

A test says whether the page is up to date.
"""

import sys
from pathlib import Path

from vapama.spec.nondet import Invariant, load_invariants

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
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(invariants_page(), encoding="utf-8")


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
    }
    listed = "".join(f"- {name}: {value}\n" for name, value in rows.items() if value)
    return f"### {invariant.name}\n\n{claim}\n\n{listed}"


if __name__ == "__main__":
    main()
