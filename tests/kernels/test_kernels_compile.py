"""Every Triton program that dispatch can choose compiles for both architectures, within their limits."""

from __future__ import annotations

import pytest
import resources

pytest.importorskip("triton")
with resources.compiled_kernels() as modules:
    VARIANTS = [
        (f"{stem}-{variant.kernel.__name__}-{variant.name}", variant)
        for stem, module in modules.items()
        for variant in getattr(module, "variants", list)()
    ]


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("variant", [pytest.param(variant, id=name) for name, variant in VARIANTS])
def test_program_compiles_within_the_chips_limits(variant, architecture):
    assert resources.triton_resources(variant, architecture).problems() == []
