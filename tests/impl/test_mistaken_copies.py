"""A seeded mistake is in its copy of impl/ alone, and there wherever the patched file is used."""

import sys

import pytest

from vapama import impl
from vapama.bugs.mistakes import MISTAKES, Mistake, parse
from vapama.impl import optimized
from vapama.impl.kernels import long_mode
from vapama.impl.kernels.compiled import fingerprint

DIRTY = MISTAKES["reads-set-dirty"]


def test_a_copy_has_the_mistake_wherever_the_file_is_used() -> None:
    module = DIRTY.module("vapama.impl.optimized")
    assert module is not optimized
    assert module.long_mode.walk.__code__.co_filename.startswith("<")
    assert module.long_mode.mark.__code__.co_code != long_mode.mark.__code__.co_code
    assert type(DIRTY.subject()).__module__ == "vapama.impl.optimized"


def test_the_original_stays_as_it_was() -> None:
    before = {name: module for name, module in sys.modules.items() if "vapama" in name}
    DIRTY.subject()
    assert {name: module for name, module in sys.modules.items() if "vapama" in name} == before
    assert sys.modules["vapama"].impl is impl
    assert impl.optimized is optimized


def test_no_machine_code_of_a_copy_is_kept() -> None:
    module = DIRTY.module("vapama.impl.kernels.compiled")
    assert not module._has_a_file(DIRTY.module().mark)


def test_kept_machine_code_is_of_the_callees_as_they_are() -> None:
    mistaken = DIRTY.module().walk_and_mark
    assert mistaken.__code__.co_code == long_mode.walk_and_mark.__code__.co_code
    assert fingerprint(mistaken) != fingerprint(long_mode.walk_and_mark)
    assert fingerprint(mistaken) == fingerprint(DIRTY.module().walk_and_mark)
    assert fingerprint(long_mode.finish) == fingerprint(DIRTY.module().finish)


def test_a_mistake_that_no_longer_fits_is_told() -> None:
    with pytest.raises(LookupError, match=r"no longer fits impl/optimized.py: .* there 0 times"):
        Mistake("gone", "impl/optimized.py", "no such line\n", "").subject()
    with pytest.raises(LookupError, match=r"there is no module vapama.impl.gone"):
        Mistake("gone", "impl/gone.py", "no such line\n", "").subject()


@pytest.mark.parametrize(
    "text",
    [
        "file: impl/a.py\n@ nothing\n+ more\n",
        "@ no-file\n- one\n+ two\n",
        "file: impl/a.py\n@ twice\n- one\n\n@ twice\n- one\n",
    ],
)
def test_a_malformed_mistake_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="replaces nothing, names no file, or is there twice"):
        parse(text)


def test_each_mistake_is_of_the_file_named_last() -> None:
    found = parse("file: impl/a.py\n\n@ one\n-1\n+2\n\nfile: impl/b/c.py\n@ two breaks it\n-3\n")
    assert [(m.file, m.module_name, m.before, m.after, m.breaks) for m in found.values()] == [
        ("impl/a.py", "vapama.impl.a", "1\n", "2\n", "the_walk_equals_the_reference"),
        ("impl/b/c.py", "vapama.impl.b.c", "3\n", "", "it"),
    ]
