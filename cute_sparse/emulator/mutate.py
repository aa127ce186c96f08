"""Removes one synchronisation statement at a time from a kernel and asks whether anybody notices.

    python -m cute_sparse.emulator.mutate --arch sm_90a script.py ARGS

runs an unmodified script as `python -m cute_sparse.emulator` does; each kernel is surveyed at its first launch: every
reached wait, arrive, commit, fence and barrier of its PTX is removed in turn and the launch is replayed from the same
memory, first in eager, then in late, then in random orders. A removal is noticed if a check fails, the launch
deadlocks, or memory differs bit by bit from what the unmodified kernel left. What nobody notices is either a hole in
the checks or a statement that cannot matter; each is printed.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cute_sparse import emulator
from cute_sparse.emulator.devices import Device
from cute_sparse.emulator.errors import EmulatorError

SCHEDULES = (("eager", 0), ("late", 0), *(("random", seed) for seed in range(4)))

# Statements whose only effect is order. A removed wait is one that succeeds at once; the rest vanish.
WAITS = re.compile(r"mbarrier\.(try_wait|test_wait)\b")
REMOVED = re.compile(
    r"mbarrier\.(arrive|expect_tx)\b|bar\.|barrier\.(sync|arrive|cluster)|barrier\.cta\.(sync|arrive)"
    r"|fence\b|membar\b|wgmma\.(fence|commit_group|wait_group)|tcgen05\.(commit|wait|fence)"
    r"|cp\.async\.(commit_group|wait_group|wait_all|bulk\.commit_group|bulk\.wait_group|mbarrier)"
)
STATEMENT = re.compile(
    r"^(?P<indent>\s*)(?P<guard>@!?\S+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>[^;]*);(?P<rest>.*)$"
)


@dataclass(frozen=True)
class Mutation:
    """A statement that was removed. line: 1-based in the PTX. times: how often warps executed it (in one launch)."""

    line: int
    text: str
    times: int = field(compare=False)

    @property
    def shape(self) -> str:
        """The statement without the names of its registers: what an explanation is filed under."""
        return re.sub(r"%\w+", "%", self.text)


@dataclass
class Survey:
    """noticed: by mutation, how ("RaceDetected in eager", "other result in late"). idle: those nobody noticed, of
    statements that the unmodified launch shows to make no difference (`Launch.unheard`): waits of a first lap, arrivals
    of a last one, doubled fences. survived: the rest, each of which needs an explanation. share: of those not idle.
    """

    kernel: str
    noticed: dict[Mutation, str] = field(default_factory=dict)
    idle: list[Mutation] = field(default_factory=list)
    survived: list[Mutation] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.noticed) + len(self.survived)

    @property
    def share(self) -> float:
        return len(self.noticed) / self.total if self.total else 1.0

    def __str__(self) -> str:
        noticed = f"{len(self.noticed)} of {self.total} removals noticed ({self.share:.1%})"
        lines = [f"{self.kernel}: {noticed}, {len(self.idle)} idle"]
        ways = Counter(self.noticed.values())
        lines += [f"  {count:4} {way}" for way, count in ways.most_common()]
        lines += [f"  idle: line {m.line} (executed {m.times} times): {m.text}" for m in self.idle]
        lines += [f"  survived: line {m.line} (executed {m.times} times): {m.text}" for m in self.survived]
        return "\n".join(lines)


def combined(surveys: Sequence[Survey]) -> Survey:
    """One survey of a kernel from those of several launches: what one launch lacks (a second work tile, a tile without
    keys), another has. Noticed is what some launch noticed; idle, what was idle wherever it was reached.

    Raises ValueError if the surveys are not of one kernel.
    """
    first = surveys[0]
    texts: dict[int, str] = {}
    result = Survey(first.kernel)
    for each in surveys:
        for mutation in [*each.noticed, *each.idle, *each.survived]:
            if each.kernel != first.kernel or texts.setdefault(mutation.line, mutation.text) != mutation.text:
                raise ValueError(f"not of one kernel: {first.kernel} and {each.kernel}, PTX line {mutation.line}")
        result.noticed = each.noticed | result.noticed
    survived = dict.fromkeys(m for each in surveys for m in each.survived)
    idle = dict.fromkeys(m for each in surveys for m in each.idle)
    result.survived = [m for m in survived if m not in result.noticed]
    result.idle = [m for m in idle if m not in result.noticed and m not in survived]
    return result


def mutations(ptx: str, reached: Mapping[int, int]) -> Iterator[tuple[Mutation, str]]:
    """Every removal of a reached synchronisation statement, with the PTX that results."""
    lines = ptx.split("\n")
    for index, line in enumerate(lines):
        found = STATEMENT.match(line)
        times = reached.get(index + 1, 0)
        if found is None or not times:
            continue
        opcode = found["opcode"]
        if WAITS.match(opcode):
            predicate = found["operands"].split(",")[0].strip()
            replacement = f"{found['indent']}{found['guard'] or ''}setp.eq.u32 {predicate}, 0, 0;{found['rest']}"
        elif REMOVED.match(opcode):
            replacement = f"{found['indent']}{found['rest']}"
        else:
            continue
        text = " ".join(line.split())
        yield Mutation(index + 1, text, times), "\n".join([*lines[:index], replacement, *lines[index + 1 :]])


def survey(
    device: Device, schedules: Sequence[tuple[str, int]] = SCHEDULES, *, after: Survey | None = None
) -> Survey:
    """Surveys the device's last launch, which must have been recorded (`device.core.record(True)` before it).

    after: a survey of other launches of the same kernel; what those noticed is not tried again, and the result is
    `combined` with it.

    The launch's tensors, its results too, must still be alive. Raises EmulatorError if they are not, and if the
    unmodified kernel does not pass every schedule with the same memory: a survey of a kernel that is wrong, or whose
    result depends on the order, says nothing.
    """
    device.memory.sweep()
    core, launch = device.core, device.launches[-1]
    ptx = core.recorded_ptx()
    for order, seed in schedules:
        if not core.replay(ptx, order, seed):
            raise EmulatorError(f"the unmodified kernel leaves other memory in order {order}, seed {seed}")
    result = Survey(launch.name)
    for mutation, mutated in mutations(ptx, launch.lines):
        if after is not None and mutation in after.noticed:
            continue
        idle = mutation.line in launch.unheard  # the other schedules would make no difference either
        how = _how_noticed(device, mutated, schedules[:1] if idle else schedules)
        if how is None:
            (result.idle if idle else result.survived).append(mutation)
        else:
            result.noticed[mutation] = how
    return result if after is None else combined([after, result])


def _how_noticed(device: Device, ptx: str, schedules: Sequence[tuple[str, int]]) -> str | None:
    for order, seed in schedules:
        try:
            if not device.core.replay(ptx, order, seed):
                return f"other result in {order}"
        except EmulatorError as error:
            return f"{type(error).__name__} in {order}"
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cute_sparse.emulator.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", required=True, choices=list(emulator.ARCHES))
    parser.add_argument("--sms", type=int, default=4)
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    options = parser.parse_args(arguments)
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script}")
    surveyed: set[str] = set()

    device = emulator.device(options.arch, sms=options.sms, torch_cuda=True)

    def on_launch(launch: emulator.Launch) -> None:
        if launch.name not in surveyed:
            surveyed.add(launch.name)
            print(survey(device), flush=True)

    device.on_launch = on_launch
    sys.argv = [options.script, *options.script_arguments]
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    with device:
        device.core.record(True)
        try:
            runpy.run_path(options.script, run_name="__main__")
        finally:
            device.core.record(False)


if __name__ == "__main__":
    main()
