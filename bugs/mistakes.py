"""Seeded mistakes: small patches of impl/, or of a model in spec/, the kinds that people make.

Each must be refuted by every engine that means to be trusted: a proof whose twin (the same claim
about the implementation with a mistake) is not refuted proves nothing. They stand in the
``.mistakes`` files beside this module, each for one file of impl/ or more.
"""

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from itertools import takewhile
from pathlib import Path
from typing import Any

WALK = "the_walk_equals_the_reference"
IMPL = "vapama.impl"


@dataclass(frozen=True)
class Mistake:
    """A patch: lines `before`, which stand once in `file`, become `after`.

    The file is one of impl/, or a model in spec/ that proofs are about. `breaks` is an invariant
    that it breaks. `story` says where the mistake was made, if it was: a commit or an advisory,
    and what happened.
    """

    name: str
    file: str
    before: str
    after: str
    breaks: str = WALK
    story: str = ""

    @property
    def module_name(self) -> str:
        """The module that it patches."""
        return "vapama." + self.file.removesuffix(".py").replace("/", ".")

    def source(self) -> str:
        """The patched source of its file. Raises `LookupError` if the patch does not fit."""
        source = _source(self.module_name)
        times = source.count(self.before)
        if times != 1:
            raise LookupError(
                f"the mistake {self.name} no longer fits {self.file}: "
                f"its lines stand there {times} times"
            )
        return source.replace(self.before, self.after)

    def module(self, name: str = "") -> types.ModuleType:
        """A module of impl/ (by default the patched one) out of a copy of all of impl/ that has
        the mistake in it, so that it shows wherever the patched file is used. A model alone.
        """
        if not _is_ours(self.module_name):
            module = types.ModuleType(self.module_name)
            exec(
                compile(self.source(), f"<{self.module_name} with a mistake>", "exec"), vars(module)
            )
            return module
        with _copy_of_impl(self.module_name, self.source()):
            return importlib.import_module(name or self.module_name)

    def subject(self) -> Any:
        """The `optimized` subject with the mistake in it, or with the mistaken model beside it."""
        if not _is_ours(self.module_name):
            subject = importlib.import_module(f"{IMPL}.optimized").Optimized()
            subject.model = self.module()
            return subject
        return self.module(f"{IMPL}.optimized").Optimized()

    def compiled_subject(self) -> Any:
        """The `compiled` subject with the mistake in it."""
        if not _is_ours(self.module_name):
            return self.subject()
        return self.module(f"{IMPL}.optimized").Compiled()


@cache
def _source(module_name: str) -> str:
    parent, _, _ = module_name.rpartition(".")
    spec = PathFinder.find_spec(module_name, importlib.import_module(parent).__path__)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no module {module_name} to put a mistake into")
    return Path(spec.origin).read_text()


@contextmanager
def _copy_of_impl(patched: str, source: str) -> Iterator[None]:
    """While this lasts, imports of `vapama.impl` make a new copy of it, with one file patched."""
    package = importlib.import_module("vapama")
    original = importlib.import_module(IMPL)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    finder = _CopyFinder(patched, source)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(filter(_is_ours, sys.modules)):
            del sys.modules[name]
        sys.modules.update(kept)
        package.impl = original  # type: ignore[attr-defined]  # as importing a submodule sets it


def _is_ours(name: str) -> bool:
    return name == IMPL or name.startswith(f"{IMPL}.")


class _CopyFinder(MetaPathFinder, Loader):
    """Finds the modules of impl/ and runs their code anew, one of them from a patched source."""

    def __init__(self, patched: str, source: str) -> None:
        self.patched, self.source = patched, source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: object = None
    ) -> ModuleSpec | None:
        """The module's own spec, but with this object as its loader."""
        found = PathFinder.find_spec(fullname, path) if _is_ours(fullname) else None
        if found is None or found.origin is None:
            return None
        spec = spec_from_loader(fullname, self, origin=found.origin)
        if spec is not None:
            spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def get_source(self, fullname: str) -> str:
        """The source of a module of this copy."""
        return self.source if fullname == self.patched else _source(fullname)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run its code, which claims no file: numba must not keep machine code of a copy."""
        name = module.__name__
        spec = module.__spec__
        assert spec is not None
        assert spec.origin is not None
        if name == self.patched:
            code = compile(self.source, f"<{name} with a mistake>", "exec")
        else:
            code = _code(name, spec.origin)
        exec(code, module.__dict__)


@cache
def _code(name: str, origin: str) -> types.CodeType:
    return compile(Path(origin).read_text(), f"<a copy of {name}>", "exec")


def parse(text: str) -> dict[str, Mistake]:
    """Mistakes by name. A line ``file: impl/...`` says which file those after it patch. Each begins
    with ``@ name`` or ``@ name breaks invariant``; then come the lines to replace, behind ``-``,
    and those to put there, behind ``+``. The comment just above it, behind ``#``, is its story.
    Raises `ValueError`.
    """
    found: dict[str, Mistake] = {}
    file = story = ""
    for block in f"\n{text}".split("\n@ "):
        title, *lines = block.split("\n")
        name, *breaks = title.split(" breaks ")
        before = "".join(f"{line[1:]}\n" for line in lines if line.startswith("-"))
        after = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
        if name:
            if not before or not file or name in found:
                raise ValueError(
                    f"the mistake {name} replaces nothing, names no file, or is there twice"
                )
            (breaks_,) = breaks or [WALK]
            found[name] = Mistake(name, file, before, after, breaks_, story)
        comment = list(takewhile(lambda line: line.startswith("#"), reversed(lines)))
        story = " ".join(line[1:].strip() for line in reversed(comment))
        for line in lines:
            if line.startswith("file: "):
                file = line.removeprefix("file: ").strip()
    return found


def load() -> dict[str, Mistake]:
    """The mistakes of all ``.mistakes`` files. Raises `ValueError`."""
    found: dict[str, Mistake] = {}
    for path in sorted(Path(__file__).parent.glob("*.mistakes")):
        for name, mistake in parse(path.read_text()).items():
            if name in found:
                raise ValueError(f"the mistake {name} is there twice, in {path.name} too")
            found[name] = mistake
    return found


MISTAKES = load()
