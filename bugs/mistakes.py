"""Seeded mistakes: small patches of the walk kernels, the kinds that people make.

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
    """A patch: lines `before` in the kernels' source, which stand there once, become `after`.

    `breaks` is an invariant that it breaks.
    """

    name: str
    before: str
    after: str
    breaks: str = "the_walk_equals_the_reference"

    def source(self) -> str:
        """The kernels' source with the mistake in it. Raises `LookupError` if it does not fit."""
        source = inspect.getsource(long_mode)
        times = source.count(self.before)
        if times != 1:
            raise LookupError(
                f"the mistake {self.name} no longer fits impl/kernels/long_mode.py: "
                f"its lines stand there {times} times"
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


def parse(text: str) -> dict[str, Mistake]:
    """Mistakes by name. Each begins with ``@ name`` or ``@ name breaks invariant``; then come the
    lines to replace, behind ``-``, and those to put there, behind ``+``. Raises `ValueError`.
    """
    found: dict[str, Mistake] = {}
    for block in text.split("\n@ ")[1:]:
        title, *lines = block.split("\n")
        name, *breaks = title.split(" breaks ")
        before = "".join(f"{line[1:]}\n" for line in lines if line.startswith("-"))
        after = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
        if not before or name in found:
            raise ValueError(f"the mistake {name} replaces nothing, or is there twice")
        found[name] = Mistake(name, before, after, *breaks)
    return found


MISTAKES = parse(
    """# Rights

@ user-writes-ignore-read-only-without-wp
-    strict = write & (user | mode >> MODE_WP)
+    strict = write & (mode >> MODE_WP)

@ wp-is-ignored
-    strict = write & (user | mode >> MODE_WP)
+    strict = write & user

@ write-rights-come-from-the-leaf
-        rights = rights & entry
+        rights = rights & entry & 4 | entry & 2

@ a-user-page-needs-only-its-leaf
-        rights = rights & entry
+        rights = entry

@ no-execute-counts-only-at-the-leaf
-        no_execute = no_execute | entry >> 63
+        no_execute = entry >> 63

@ no-execute-of-the-leaf-is-forgotten
-        no_execute = no_execute | entry >> 63
-        if leaf:
-            break
+        if leaf:
+            break
+        no_execute = no_execute | entry >> 63

@ two-no-executes-cancel
-        no_execute = no_execute | entry >> 63
+        no_execute = no_execute ^ entry >> 63

@ reads-need-a-writable-page
-        | strict & (rights >> 1 & 1 ^ 1)
+        | (strict | fetch ^ 1 ^ write) & (rights >> 1 & 1 ^ 1)

@ smep-is-ignored
-    smep = fetch & mode >> MODE_SMEP
+    smep = 0

@ smap-stops-fetches-too
-    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1) ^ 1)
+    smap = mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1) ^ 1)

@ ac-exempts-implicit-accesses
-    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1) ^ 1)
+    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC ^ 1)

@ ac-does-not-exempt
-    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1) ^ 1)
+    smap = (fetch ^ 1) & mode >> MODE_SMAP & (1)

@ ac-forbids-instead-of-allowing
-    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1) ^ 1)
+    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1))

@ a-dirty-page-is-denied
-        | key_denies
+        | key_denies | entry >> 6 & access >> 1 & 1

# Protection keys

@ a-key-has-three-bits
-        keys = pkru >> (entry >> 59 & 15) * 2 & 3 * (mode >> MODE_PKE & 1)
+        keys = pkru >> (entry >> 59 & 7) * 2 & 3 * (mode >> MODE_PKE & 1)

@ supervisor-pages-use-pkru
-        keys = pkrs >> (entry >> 59 & 15) * 2 & 3 * (mode >> MODE_PKS & 1)
+        keys = pkru >> (entry >> 59 & 15) * 2 & 3 * (mode >> MODE_PKS & 1)

@ pke-is-ignored
-        keys = pkru >> (entry >> 59 & 15) * 2 & 3 * (mode >> MODE_PKE & 1)
+        keys = pkru >> (entry >> 59 & 15) * 2 & 3

@ pks-is-ignored
-        keys = pkrs >> (entry >> 59 & 15) * 2 & 3 * (mode >> MODE_PKS & 1)
+        keys = pkrs >> (entry >> 59 & 15) * 2 & 3

@ keys-stop-fetches
-    key_denies = (fetch ^ 1) & (keys | keys >> 1 & strict)
+    key_denies = (keys | keys >> 1 & strict)

@ write-disable-stops-reads
-    key_denies = (fetch ^ 1) & (keys | keys >> 1 & strict)
+    key_denies = (fetch ^ 1) & (keys | keys >> 1 & 1)

@ write-disable-ignores-wp
-    key_denies = (fetch ^ 1) & (keys | keys >> 1 & strict)
+    key_denies = (fetch ^ 1) & (keys | keys >> 1 & write)

# Error codes

@ the-key-bit-is-misplaced
-        return FAULT, code | 1 | key_denies << 5
+        return FAULT, code | 1 | key_denies << 4

@ a-missing-page-reports-present
-            return FAULT, code
+            return FAULT, code | 1

@ a-reserved-bit-reports-not-present
-            return FAULT, code | 9
+            return FAULT, code | 8

@ smep-alone-reports-no-fetch
-    code = (write << 1) | (user << 2) | ((fetch & (mode >> MODE_NXE | mode >> MODE_SMEP)) << 4)
+    code = (write << 1) | (user << 2) | ((fetch & mode >> MODE_NXE) << 4)

# Reserved bits

@ a-reserved-bit-of-a-large-page-is-missed
-                must_be_zero = reserved | 0x1FE000
+                must_be_zero = reserved | 0x1FC000

@ a-reserved-bit-of-a-1g-page-is-missed
-                must_be_zero = reserved | 0x3FFFE000 | ((mode >> MODE_PAGE1GB & 1 ^ 1) << 7)
+                must_be_zero = reserved | 0x3FFFC000 | ((mode >> MODE_PAGE1GB & 1 ^ 1) << 7)

@ pat-of-a-large-page-is-reserved
-                must_be_zero = reserved | 0x1FE000
+                must_be_zero = reserved | 0x1FF000

@ ps-in-a-pml4e-is-taken
-            must_be_zero = reserved | 0x80
+            must_be_zero = reserved

@ 1g-pages-always-exist
-                must_be_zero = reserved | 0x3FFFE000 | ((mode >> MODE_PAGE1GB & 1 ^ 1) << 7)
+                must_be_zero = reserved | 0x3FFFE000 | 0

@ maxphyaddr-is-one-more
-    return 0x0010000000000000 - (1 << maxphyaddr) | (efer >> 11 & 1 ^ 1) << 63
+    return 0x0010000000000000 - (1 << maxphyaddr) & ~(1 << maxphyaddr) | (efer >> 11 & 1 ^ 1) << 63

@ nx-without-nxe-is-ignored
-    return 0x0010000000000000 - (1 << maxphyaddr) | (efer >> 11 & 1 ^ 1) << 63
+    return 0x0010000000000000 - (1 << maxphyaddr) | (efer >> 11 & 1 ^ 1) << 58

@ a-software-bit-is-reserved
-        must_be_zero = reserved
+        must_be_zero = reserved | 0x200

# Structure

@ canonical-is-one-bit-short
-    upper = address >> (shift - 1)
-    if upper != 0 and upper != (1 << (65 - shift)) - 1:
+    upper = address >> shift
+    if upper != 0 and upper != (1 << (64 - shift)) - 1:

@ the-top-of-memory-is-not-canonical
-    if upper != 0 and upper != (1 << (65 - shift)) - 1:
+    if upper != 0:

@ five-levels-start-at-four
-        level = 5
+        level = 4

@ a-2m-page-is-a-1g-page
-            if level == 2:
+            if level == 3:

@ the-frame-loses-its-top-bit
-        table = entry & FRAME
+        table = entry & (FRAME >> 1)

@ the-pcid-moves-the-root
-    table = cr3 & FRAME
+    table = cr3 & (FRAME | 8)

@ the-offset-loses-its-top-bit
-    return level, (entry & FRAME & ~offset) | (address & offset)
+    return level, (entry & FRAME & ~offset) | (address & offset >> 1)

@ the-limit-is-off-by-one
-        if index >= entries:
+        if index > entries:

@ the-walk-reads-an-entry-twice breaks a_walk_ends_after_at_most_one_load_a_level
-        if not entry & 1:
-            return FAULT, code
+        entry = memory[index]
+        if not entry & 1:
+            return FAULT, code

@ the-batch-shares-its-first-result breaks translate_many_equals_the_walk_elementwise
-            memory, entries, mode, reserved, cr3, pkru, pkrs, addresses[i], access, path
+            memory, entries, mode, reserved, cr3, pkru, pkrs, addresses[0], access, path

# Accessed and dirty flags

@ reads-set-dirty
-    memory[path[level]] = memory[path[level]] | 0x20 | write << 6
+    memory[path[level]] = memory[path[level]] | 0x60

@ dirty-is-forgotten
-    memory[path[level]] = memory[path[level]] | 0x20 | write << 6
+    memory[path[level]] = memory[path[level]] | 0x20

@ accessed-is-set-only-at-the-leaf
-    while at > level:
+    while at > level + 9:

@ a-denied-write-sets-dirty breaks a_fault_sets_at_most_accessed_flags_on_its_path
-    if status < FAULT:
+    if status == FAULT and value & 3 == 3:
+        marks[path[1]] = marks[path[1]] | 0x40
+    if status < FAULT:
"""
)
"""The seeded mistakes of the walk, by name."""
