"""What the emulator refuses or finds, one exception class for each kind."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Something the emulator refuses or finds. What does not apply is None.

    kernel: the kernel's name. cta: linear CTA index in the grid. warp: index in the CTA. lane: index in the warp.
    ptx_line: 1-based line of the kernel's PTX. ptx_text: that statement. source: "file:line" where the PTX carries
    line information (compile with CUTE_DSL_LINEINFO=1). tensor: name of the registered tensor that is involved.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str | None = None,
        cta: int | None = None,
        warp: int | None = None,
        lane: int | None = None,
        ptx_line: int | None = None,
        ptx_text: str | None = None,
        source: str | None = None,
        tensor: str | None = None,
    ):
        self.message = message
        self.kernel, self.cta, self.warp, self.lane = kernel, cta, warp, lane
        self.ptx_line, self.ptx_text, self.source, self.tensor = ptx_line, ptx_text, source, tensor
        super().__init__(message)

    def __str__(self) -> str:
        place = [
            f"{name} {value}" for name, value in (("CTA", self.cta), ("warp", self.warp), ("lane", self.lane))
            if value is not None
        ]  # fmt: skip
        lines = [self.message]
        if place:
            lines.append("in " + ", ".join(place))
        if self.ptx_line is not None:
            lines.append(f"at PTX line {self.ptx_line}: {self.ptx_text or ''}".rstrip(": "))
        if self.source is not None:
            lines.append(f"from {self.source}")
        if self.tensor is not None:
            lines.append(f"tensor {self.tensor}")
        if self.kernel is not None:
            lines.append(f"kernel {self.kernel}")
        return "\n  ".join(lines)


# Found in a kernel, or in what a launch asks for: one class for each ErrorKind of core/error.h.


class PtxSyntaxError(EmulatorError):
    """PTX text that the parser does not understand."""


class UnknownOpcode(EmulatorError):
    """PTX statements that the emulator does not know; the message lists all of them with their lines."""


class BadLaunch(EmulatorError):
    """A grid, block, cluster, amount of shared memory, attribute or library that the device refuses."""


class OutOfBounds(EmulatorError):
    """Access to global memory outside every registered tensor, or outside shared or tensor memory."""


class Misaligned(EmulatorError):
    """An address, descriptor or tensor map that is not aligned as its instruction demands."""


class Uninitialised(EmulatorError):
    """Read of a register, of shared or of tensor memory that nothing has written."""


class InFlightAccess(EmulatorError):
    """Access to data that an asynchronous operation still owns (a wait is missing)."""


class RaceDetected(EmulatorError):
    """Two conflicting accesses that nothing orders."""


class MissingProxyFence(EmulatorError):
    """What an ordinary write wrote is read or written by the async proxy without fence.proxy.async between them."""


class BarrierError(EmulatorError):
    """Misuse of a barrier: before its initialisation, too many arrivals, wrong counts, a phase that a wait may miss."""


class TensorMemoryError(EmulatorError):
    """Misuse of tcgen05 allocation: columns leaked, freed twice, or not this CTA's."""


class ConvergenceError(EmulatorError):
    """An instruction that needs lanes together which can never meet."""


class Deadlock(EmulatorError):
    """Every warp is blocked; the message lists each with what it waits for."""


class InstructionLimit(EmulatorError):
    """The launch executed more warp instructions than `max_warp_instructions` allows."""


class Trap(EmulatorError):
    """The kernel executed trap."""


class InvalidOperand(EmulatorError):
    """A run-time operand outside what the PTX ISA allows."""


BY_KIND: dict[str, type[EmulatorError]] = {
    "parse": PtxSyntaxError,
    "unknown_opcode": UnknownOpcode,
    "bad_launch": BadLaunch,
    "out_of_bounds": OutOfBounds,
    "misaligned": Misaligned,
    "uninitialised": Uninitialised,
    "in_flight": InFlightAccess,
    "race": RaceDetected,
    "missing_proxy_fence": MissingProxyFence,
    "barrier": BarrierError,
    "tensor_memory": TensorMemoryError,
    "convergence": ConvergenceError,
    "deadlock": Deadlock,
    "timeout": InstructionLimit,
    "trap": Trap,
    "invalid_operand": InvalidOperand,
}


def from_core(report: dict) -> EmulatorError:
    """The exception for an error report of the core (core/c_api.h, emulator_take_error)."""

    def known(name: str):
        value = report[name]
        return value if value != "" and (not isinstance(value, int) or value >= 0) else None

    return BY_KIND[report["kind"]](
        report["message"],
        kernel=known("kernel"),
        cta=known("cta"),
        warp=known("warp"),
        lane=known("lane"),
        ptx_line=report["ptx_line"] or None,
        ptx_text=known("ptx_text"),
        source=known("source"),
        tensor=known("tensor"),
    )


# Refused before anything reaches the core.


class UnknownArch(EmulatorError, ValueError):
    """An architecture that the emulator has no model of."""


class UnsupportedVersion(EmulatorError):
    """A version of nvidia-cutlass-dsl whose private classes the emulator does not know, or without what they need."""


class BuildError(EmulatorError):
    """The core cannot be built: no compiler, or the compiler refuses it."""


class AlreadyEntered(EmulatorError):
    """Two emulated devices at once."""


class NotEntered(EmulatorError):
    """An emulated function is called while no emulated device is entered."""


class NotCompiledHere(BadLaunch):
    """A function is called in an emulated device that was compiled before the device was entered."""


class WrongArch(BadLaunch):
    """A function compiled for one architecture is called in an emulated device of another."""


class WrongDevice(EmulatorError, TypeError):
    """A tensor that is not on the CPU."""
