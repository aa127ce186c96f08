"""A timeline of one cluster of a script's launch, in modelled clocks, for Perfetto (https://ui.perfetto.dev).

    python -m cute_sparse.emulator.timeline --arch sm_100a --out timeline.json script.py ARGS

runs an unmodified script that uses torch's "cuda" device, as `python -m cute_sparse.emulator` does, and writes a Chrome
trace: a process for each CTA of the cluster, in it a track for each warp (its waits with the line of the PTX, its
exponentials) and for each engine (tensor core, TMA loads and stores). A microsecond on Perfetto's axis is one clock.
The clocks are the model's (timing.py): they show what waits for what, and are no measurement.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from cute_sparse import emulator
from cute_sparse.emulator import chips, timing
from cute_sparse.emulator.counts import Launch
from cute_sparse.emulator.timing import Estimate

TENSOR_CORE = "tensor core"
IN_FLIGHT = ("TMA loads", "TMA stores")  # several at a time


def chrome_trace(launch: Launch, estimate: Estimate) -> dict:
    """The Trace Event Format's JSON object. "M": names of processes and threads; "X": what follows one another on a
    thread; "b" and "e": begin and end of what may overlap."""
    roles = timing.roles(launch)
    tracks = _tracks(launch, estimate)
    events = [_named("process_name", cta, 0, f"CTA {cta} of the cluster") for cta in range(len(estimate.ctas))]
    for cta in range(len(estimate.ctas)):
        for (track, what), thread in tracks.items():
            role = f": {roles[int(track.split()[1])]}" if track.startswith("warp") else ""
            events.append(_named("thread_name", cta, thread, f"{track}{role}" if not what else f"{track}, its {what}"))
    ends: dict[tuple[int, int], float] = {}
    for number, event in enumerate(sorted(estimate.events, key=lambda e: (e.begin, -e.end))):
        thread = tracks[_place(event)]
        common = {"pid": event.cta, "tid": thread, "name": event.name}
        if event.track in IN_FLIGHT:
            common |= {"cat": event.track, "id": number}
            events += [common | {"ph": "b", "ts": event.begin}, common | {"ph": "e", "ts": event.end}]
            continue
        begin = max(event.begin, ends.get((event.cta, thread), 0))  # a poll may begin while another is under way
        if event.end > begin:
            ends[event.cta, thread] = event.end
            events.append(common | {"ph": "X", "ts": begin, "dur": event.end - begin})
    return {"traceEvents": events, "otherData": {"kernel": launch.name, "clocks": estimate.cycles}}


def _place(event: timing.Event) -> tuple[str, str]:
    """A warp's exponentials have a track of their own: they go on while it polls."""
    return event.track, event.name if event.name == "exponentials" else ""


def _tracks(launch: Launch, estimate: Estimate) -> dict[tuple[str, str], int]:
    """Thread numbers of the tracks, in the order in which they should stand."""
    used = {_place(event) for event in estimate.events}
    found = [(f"warp {w}", what) for w in range(len(launch.warps)) for what in ("", "exponentials")]
    wanted = [place for place in found if not place[1] or place in used]
    wanted += [(engine, "") for engine in (TENSOR_CORE, *IN_FLIGHT)]
    return {place: thread for thread, place in enumerate(wanted)}


def _named(what: str, process: int, thread: int, name: str) -> dict:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": {"name": name}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cute_sparse.emulator.timeline", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", required=True, choices=list(emulator.ARCHES))
    parser.add_argument("--chip", help="default: " + ", ".join(f"{c} for {a}" for a, c in chips.DEFAULT_CHIP.items()))
    parser.add_argument("--cluster", type=int, default=0, help="of the launch; 0 by default")
    parser.add_argument("--kernel", default="", help="the first launch whose kernel's name has this in it")
    parser.add_argument("--sms", type=int, default=4, help="multiprocessors that persistent kernels see")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    options = parser.parse_args(arguments)
    chip = _chip(parser, options)
    if options.cluster < 0:
        parser.error(f"--cluster {options.cluster} must be at least 0")
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script}")
    if not options.out.parent.is_dir():
        parser.error(f"--out: no such folder: {options.out.parent}")

    device = emulator.device(options.arch, sms=options.sms, torch_cuda=True)
    seen: list[Launch] = []
    written: list[Estimate] = []

    def on_launch(launch: Launch) -> None:
        seen.append(launch)
        if written or options.kernel not in launch.name or not timing.traced_clusters(device, len(seen) - 1):
            return
        estimate = timing.estimate(device, chip, launch=len(seen) - 1, events=True)
        options.out.write_text(json.dumps(chrome_trace(launch, estimate)))
        written.append(estimate)
        print(f"{options.out}: {estimate.cycles:.0f} modelled clocks on {chip.name} of {launch.name}")

    sys.argv = [options.script, *options.script_arguments]
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    with device, timing.traced(device, options.cluster):
        device.on_launch = on_launch
        runpy.run_path(options.script, run_name="__main__")
        device.report_launches()
    if written:
        return 0
    launches = ", ".join(f"{launch.name} with grid {launch.grid}" for launch in seen) or "none"
    print(
        f"no launch has cluster {options.cluster} and {options.kernel!r} in its name; seen: {launches}", file=sys.stderr
    )
    return 1


def _chip(parser: argparse.ArgumentParser, options: argparse.Namespace) -> chips.Chip:
    if options.chip is None:
        return chips.chip_of(options.arch)
    fitting = [name for name, chip in chips.CHIPS.items() if chip.arch == options.arch]
    if options.chip not in fitting:
        parser.error(f"--chip {options.chip} is not one of {options.arch}: {', '.join(fitting)}")
    return chips.CHIPS[options.chip]


if __name__ == "__main__":
    sys.exit(main())
