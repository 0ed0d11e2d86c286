"""Seeded mistakes: one-line patches of the walk kernels, the kinds that people make.

Each must be refuted by every engine that means to be trusted: a proof whose twin (the same claim
about the kernels with a mistake) is not refuted proves nothing.
"""

import inspect
import types
from dataclasses import dataclass

from vapama.impl.kernels import long_mode
from vapama.impl.optimized import Compiled, Optimized


@dataclass(frozen=True)
class Mistake:
    """A patch: the text `before` in the kernels' source, which stands there once, and `after`."""

    name: str
    before: str
    after: str
    breaks: str = "the_walk_equals_the_reference"
    """An invariant that it breaks."""

    def source(self) -> str:
        """The kernels' source with the mistake in it. Raises `LookupError` if it does not fit."""
        source = inspect.getsource(long_mode)
        if source.count(self.before) != 1:
            raise LookupError(
                f"the mistake {self.name} no longer fits impl/kernels/long_mode.py: "
                f"{self.before!r} stands there {source.count(self.before)} times"
            )
        return source.replace(self.before, self.after)

    def kernels(self) -> types.ModuleType:
        """The kernels' module with the mistake in it."""
        module = types.ModuleType(long_mode.__name__)
        code = compile(self.source(), f"<{self.name}>", "exec")
        exec(code, module.__dict__)
        return module

    def subject(self) -> Optimized:
        """The `optimized` subject with the mistake in it."""
        return Optimized(self.kernels())

    def compiled_subject(self) -> Compiled:
        """The `compiled` subject with the mistake in it."""
        return Compiled(self.kernels())


MISTAKES: dict[str, Mistake] = {
    m.name: m
    for m in (
        # Rights
        Mistake(
            "user-writes-ignore-read-only-without-wp",
            "strict = write & (user | ",
            "strict = write & (",
        ),
        Mistake("wp-is-ignored", "(user | mode >> MODE_WP)", "user"),
        Mistake(
            "write-rights-come-from-the-leaf",
            "rights = rights & entry",
            "rights = rights & entry & 4 | entry & 2",
        ),
        Mistake("a-user-page-needs-only-its-leaf", "rights = rights & entry", "rights = entry"),
        Mistake(
            "no-execute-counts-only-at-the-leaf",
            "no_execute = no_execute | entry >> 63",
            "no_execute = entry >> 63",
        ),
        Mistake(
            "no-execute-of-the-leaf-is-forgotten",
            "no_execute = no_execute | entry >> 63\n        if leaf:\n            break",
            "if leaf:\n            break\n        no_execute = no_execute | entry >> 63",
        ),
        Mistake(
            "two-no-executes-cancel",
            "no_execute = no_execute | entry >> 63",
            "no_execute = no_execute ^ entry >> 63",
        ),
        Mistake(
            "reads-need-a-writable-page",
            "| strict & (rights >> 1 & 1 ^ 1)",
            "| (strict | fetch ^ 1 ^ write) & (rights >> 1 & 1 ^ 1)",
        ),
        Mistake("smep-is-ignored", "smep = fetch & mode >> MODE_SMEP", "smep = 0"),
        Mistake("smap-stops-fetches-too", "smap = (fetch ^ 1) & mode", "smap = mode"),
        Mistake(
            "ac-exempts-implicit-accesses",
            "mode >> MODE_AC & (access & 1 ^ 1) ^ 1",
            "mode >> MODE_AC ^ 1",
        ),
        Mistake("ac-does-not-exempt", "mode >> MODE_AC & (access & 1 ^ 1) ^ 1", "1"),
        Mistake(
            "ac-forbids-instead-of-allowing",
            "(mode >> MODE_AC & (access & 1 ^ 1) ^ 1)",
            "(mode >> MODE_AC & (access & 1 ^ 1))",
        ),
        Mistake(
            "a-dirty-page-is-denied",
            "| key_denies\n    )",
            "| key_denies | entry >> 6 & access >> 1 & 1\n    )",
        ),
        # Keys
        Mistake("a-key-has-three-bits", "pkru >> (entry >> 59 & 15)", "pkru >> (entry >> 59 & 7)"),
        Mistake("supervisor-pages-use-pkru", "keys = pkrs", "keys = pkru"),
        Mistake("pke-is-ignored", " & 3 * (mode >> MODE_PKE & 1)", " & 3"),
        Mistake("pks-is-ignored", " & 3 * (mode >> MODE_PKS & 1)", " & 3"),
        Mistake("keys-stop-fetches", "key_denies = (fetch ^ 1) & (", "key_denies = ("),
        Mistake("write-disable-stops-reads", "keys | keys >> 1 & strict", "keys | keys >> 1 & 1"),
        Mistake(
            "write-disable-ignores-wp", "keys | keys >> 1 & strict", "keys | keys >> 1 & write"
        ),
        # Error codes
        Mistake("the-key-bit-is-misplaced", "key_denies << 5", "key_denies << 4"),
        Mistake(
            "a-missing-page-reports-present", "return FAULT, code\n", "return FAULT, code | 1\n"
        ),
        Mistake(
            "a-reserved-bit-reports-not-present", "return FAULT, code | 9", "return FAULT, code | 8"
        ),
        Mistake(
            "smep-alone-reports-no-fetch",
            "(mode >> MODE_NXE | mode >> MODE_SMEP)",
            "mode >> MODE_NXE",
        ),
        # Reserved bits
        Mistake(
            "a-reserved-bit-of-a-large-page-is-missed", "reserved | 0x1FE000", "reserved | 0x1FC000"
        ),
        Mistake(
            "a-reserved-bit-of-a-1g-page-is-missed",
            "reserved | 0x3FFFE000",
            "reserved | 0x3FFFC000",
        ),
        Mistake("pat-of-a-large-page-is-reserved", "reserved | 0x1FE000", "reserved | 0x1FF000"),
        Mistake(
            "ps-in-a-pml4e-is-taken",
            "must_be_zero = reserved | 0x80\n",
            "must_be_zero = reserved\n",
        ),
        Mistake("1g-pages-always-exist", "((mode >> MODE_PAGE1GB & 1 ^ 1) << 7)", "0"),
        Mistake(
            "maxphyaddr-is-one-more",
            "- (1 << maxphyaddr)",
            "- (1 << maxphyaddr) & ~(1 << maxphyaddr)",
        ),
        Mistake("nx-without-nxe-is-ignored", "^ 1) << 63", "^ 1) << 58"),
        Mistake(
            "a-software-bit-is-reserved",
            "must_be_zero = reserved\n",
            "must_be_zero = reserved | 0x200\n",
        ),
        # Structure
        Mistake(
            "canonical-is-one-bit-short",
            "upper = address >> (shift - 1)\n    if upper != 0 and upper != (1 << (65 - shift)) - 1:",
            "upper = address >> shift\n    if upper != 0 and upper != (1 << (64 - shift)) - 1:",
        ),
        Mistake(
            "the-top-of-memory-is-not-canonical",
            "if upper != 0 and upper != (1 << (65 - shift)) - 1:",
            "if upper != 0:",
        ),
        Mistake(
            "five-levels-start-at-four",
            "level = 5\n        shift = 57",
            "level = 4\n        shift = 57",
        ),
        Mistake(
            "a-2m-page-is-a-1g-page",
            "if level == 2:\n                must",
            "if level == 3:\n                must",
        ),
        Mistake(
            "the-frame-loses-its-top-bit", "table = entry & FRAME", "table = entry & (FRAME >> 1)"
        ),
        Mistake("the-pcid-moves-the-root", "table = cr3 & FRAME\n", "table = cr3 & (FRAME | 8)\n"),
        Mistake("the-offset-loses-its-top-bit", "(address & offset)", "(address & offset >> 1)"),
        Mistake("the-limit-is-off-by-one", "if index >= entries:", "if index > entries:"),
        Mistake(
            "the-walk-reads-an-entry-twice",
            "path[level] = index\n",
            "path[level] = index\n        entry = memory[index]\n",
            "a_walk_ends_after_at_most_one_load_a_level",
        ),
        Mistake(
            "the-batch-shares-its-first-result",
            "addresses[i], access, path\n        )\n        statuses[i]",
            "addresses[0], access, path\n        )\n        statuses[i]",
            "translate_many_equals_the_walk_elementwise",
        ),
        # Flags
        Mistake("reads-set-dirty", "| 0x20 | write << 6", "| 0x60"),
        Mistake("dirty-is-forgotten", "| 0x20 | write << 6", "| 0x20"),
        Mistake(
            "accessed-is-set-only-at-the-leaf",
            "    while at > level:\n",
            "    while at > level + 9:\n",
        ),
        Mistake(
            "a-denied-write-sets-dirty",
            "    if status < FAULT:\n        levels",
            "    if status == FAULT and value & 3 == 3:\n        marks[path[1]] = marks[path[1]] | 0x40\n    if status < FAULT:\n        levels",
            "a_fault_sets_at_most_accessed_flags_on_its_path",
        ),
    )
}
"""By name, in the order of the walk's parts."""
