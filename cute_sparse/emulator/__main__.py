"""Runs a script whose "cuda" device is an emulated one: python -m cute_sparse.emulator --arch sm_90a script.py ARGS"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from cute_sparse import emulator
from cute_sparse.emulator.library import ORDERS


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each launch as it ends; leaves as the script does (its exit status, its exception)."""
    parser = argparse.ArgumentParser(prog="python -m cute_sparse.emulator", description=__doc__)
    parser.add_argument("--arch", required=True, choices=list(emulator.ARCHES))
    parser.add_argument("--order", default="eager", choices=ORDERS, help="when asynchronous work completes")
    parser.add_argument("--seed", type=int, default=0, help="of --order random")
    parser.add_argument("--sms", type=int, default=4, help="multiprocessors that persistent kernels see")
    parser.add_argument("--threads", type=int, help="of the host; all by default")
    parser.add_argument("--no-checks", action="store_true", help="no races, no uninitialised reads; bounds remain")
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    options = parser.parse_args(arguments)
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script}")

    device = emulator.device(
        options.arch,
        order=options.order,
        seed=options.seed,
        sms=options.sms,
        threads=options.threads,
        checks=not options.no_checks,
        torch_cuda=True,
    )
    device.on_launch = lambda launch: print(f"[emulator] {launch}", flush=True)
    sys.argv = [options.script, *options.script_arguments]
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    with device:
        runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
