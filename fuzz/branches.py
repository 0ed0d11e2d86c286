"""Which branches a run takes, told where libFuzzer looks for it.

atheris' own instrumentation calls a C++ function for each block and each comparison, which took a
sixth of a run of the walk. Here each side of a branch is a store into the byte counters that
libFuzzer reads. Comparisons are not told: what their operands are says little of the raw words that
they were decoded from.
"""

import ast
import ctypes
import types
from importlib import import_module
from typing import Any

NAME = "__branches__"
"""The global by which instrumented functions find their counters."""
MOST = 1 << 14
SIDE, ROUND = "{0}[{1}] = 1", "{0}[{1}] = {0}[{1}] + 1 & 255"
COUNTERS = bytearray(MOST)
"""Whether a run came by a side of a branch; of a loop how often it went round, modulo 256."""
PLACES = (ctypes.c_size_t * (2 * MOST))(*range(1, 2 * MOST + 1))
"""What stands for the addresses of the branches, each with flags, which libFuzzer counts."""


LEAVING = (ast.Return, ast.Break, ast.Continue, ast.Raise)


class Marked(ast.NodeTransformer):
    """Marks each side of every ``if``, and each round of every loop, by a counter of its own."""

    used = 0
    """How many counters have been given out, to all modules."""

    def __init__(self, tree: ast.AST) -> None:
        self.guards = guards(tree)

    def visit_If(self, node: ast.If) -> ast.If:
        """Both sides, the empty one too unless the next branch tells of it."""
        is_guard = node in self.guards
        self.generic_visit(node)
        node.body.insert(0, self._mark(SIDE))
        if not is_guard:
            node.orelse.insert(0, self._mark(SIDE))
        return node

    def visit_While(self, node: ast.While) -> ast.While:
        """The rounds of a loop."""
        self.generic_visit(node)
        node.body.insert(0, self._mark(ROUND))
        return node

    def visit_For(self, node: ast.For) -> ast.For:
        """The same."""
        self.generic_visit(node)
        node.body.insert(0, self._mark(ROUND))
        return node

    def _mark(self, statement: str) -> ast.stmt:
        Marked.used += 1
        return ast.parse(statement.format(NAME, Marked.used - 1)).body[0]


def guards(tree: ast.AST) -> set[ast.If]:
    """Each ``if`` without ``else`` that leaves its block, where another ``if`` comes later in it:
    a run that goes on takes a side of that one.
    """
    found = set()
    blocks = [getattr(node, part, None) for node in ast.walk(tree) for part in ("body", "orelse")]
    for block in blocks:
        later = False
        for statement in reversed(block if isinstance(block, list) else []):
            if isinstance(statement, ast.If):
                if later and not statement.orelse and isinstance(statement.body[-1], LEAVING):
                    found.add(statement)
                later = True
    return found


def instrument(module: types.ModuleType) -> None:
    """Make the functions of a module tell which branches they take.

    In place, and only of this module: the branches of the decoder say nothing of what is tested.
    """
    spec: Any = module.__spec__
    tree = ast.parse(spec.loader.get_source(module.__name__))
    tree = Marked(tree).visit(tree)
    code = compile(ast.fix_missing_locations(tree), spec.origin, "exec", dont_inherit=True)
    marked = {part.co_name: part for part in code.co_consts if isinstance(part, types.CodeType)}
    setattr(module, NAME, COUNTERS)
    for name, function in vars(module).items():
        if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
            function.__code__ = marked.get(name, function.__code__)


def register() -> None:
    """Show libFuzzer the counters, by the interface through which compiled code shows its own.

    Raises `RuntimeError` if there are not enough of them.
    """
    if Marked.used > MOST:
        raise RuntimeError(f"{Marked.used} branches to tell apart, and counters for {MOST}")
    library = ctypes.CDLL(import_module("atheris.core_with_libfuzzer").__file__)
    counters = ctypes.addressof(ctypes.c_char.from_buffer(COUNTERS))
    places = ctypes.addressof(PLACES)
    for show, start, size in (
        (library.__sanitizer_cov_8bit_counters_init, counters, 1),
        (library.__sanitizer_cov_pcs_init, places, 2 * ctypes.sizeof(ctypes.c_size_t)),
    ):
        show(ctypes.c_void_p(start), ctypes.c_void_p(start + Marked.used * size))
