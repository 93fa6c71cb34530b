"""Every Triton program that dispatch can choose compiles for both architectures, within their limits."""

from __future__ import annotations

import pytest
import resources

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def programs(request):
    """All programs of the modules that this run asks for, compiled side by side."""
    here = [item for item in request.session.items if item.path == request.path]
    return resources.triton_programs(tuple(sorted({item.callspec.params["stem"] for item in here})))


@pytest.mark.parametrize("stem", resources.triton_stems())
def test_programs_compile_within_the_chips_limits(programs, stem):
    ours = [program for of, program in programs if of == stem]
    assert {program.architecture for program in ours} == set(resources.ARCHITECTURES)
    problems = {f"{program.name} {program.architecture}": program.problems() for program in ours}
    assert {name: found for name, found in problems.items() if found} == {}
