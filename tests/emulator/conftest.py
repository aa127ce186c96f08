"""Small PTX kernels on an emulated device."""

from __future__ import annotations

import pytest

from cute_sparse import emulator
from cute_sparse.emulator.text import module, run_ptx


@pytest.fixture(params=["sm_90a"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(arch: str, request: pytest.FixtureRequest):
    """An entered device; a test may parametrize it indirectly with settings of emulator.device."""
    settings = {"sms": 2, "threads": 1, "max_warp_instructions": 2_000_000} | getattr(request, "param", {})
    with emulator.device(arch, **settings) as entered:
        yield entered


@pytest.fixture
def run(device, arch):
    """run(body, arguments, parameters=..., registers=..., shared=..., **launch) -> Launch"""

    def run_body(body, arguments=(), *, parameters="", registers="", shared="", **launch):
        ptx = module(arch, body, parameters=parameters, registers=registers, shared=shared)
        return run_ptx(device, ptx, arguments, **launch)

    return run_body
