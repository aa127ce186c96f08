"""Rows of measurements as tables and plots: python -m profiling.report [FOLDER...]

Reads prefill.jsonl, decode.jsonl and host.jsonl of each folder (default: every one in profiling/results), as far as
they are there, writes README.md beside them with the tables and, where matplotlib is installed, plots as PNG and SVG:
prefill's rate against length, decode's bandwidth against bytes, speed-up against sparsity, roofline. The tables also
go into this project's README.md, between the lines MARK_BEGIN and MARK_END where it has them. Of measurements of the
same thing the latest counts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

from profiling import decode, rows
from profiling.bench import CASES, OURS, flops
from profiling.peers import PEERS, Shape
from profiling.rows import Row

README = Path(__file__).resolve().parent.parent / "README.md"
MARK_BEGIN, MARK_END = "<!-- measured: begin -->", "<!-- measured: end -->"
CEILING = 2.0  # Q K^T always runs, and K is always read: half of the work cannot be skipped
OPS = {"prefill": CASES, "decode": decode.CASES, "host": {}}  # each in a file of its own; the cases in their order
PEERS_OF = {"prefill": tuple(PEERS), "decode": tuple(decode.PEERS), "host": ()}
# Copy (read + write) in TB/s and BF16 matrix product (8192^3, random data) in TFLOP/s, as measured with PyTorch.
ROOFS = {"NVIDIA H200": (4.3, 790.0)}



class Measured:
    """The latest row of each (case, mode, provider, metric) of one operation on one GPU."""

    def __init__(self, all_rows: Iterable[Row], op: str = "prefill") -> None:
        self.op, self.known_cases, self.peers = op, OPS[op], PEERS_OF[op]
        self.latest: dict[tuple[str, str, str, str], Row] = {}
        for row in sorted(all_rows, key=lambda row: row.time):
            self.latest[row.case, row.mode, row.provider, row.metric] = row
        if not self.latest:
            raise ValueError("there are no rows to report")
        ops = sorted({row.op for row in self.latest.values()})
        if ops != [op]:
            raise ValueError(f"rows of {', '.join(ops)} where those of {op} are expected")
        gpus = sorted({row.gpu for row in self.latest.values()})
        if len(gpus) > 1:
            raise ValueError(f"rows of several GPUs in one folder: {', '.join(gpus)}")
        self.gpu = gpus[0]

    def value(self, case: str, mode: str, provider: str, metric: str) -> float | None:
        row = self.latest.get((case, mode, provider, metric))
        return None if row is None else row.p50

    def providers(self, mode_of: Iterable[str]) -> list[str]:
        modes = set(mode_of)
        present = {provider for _, mode, provider, metric in self.latest if mode in modes and metric == "time"}
        return [name for name in (OURS, *self.peers) if name in present]

    def cases(self, mode: str) -> list[str]:
        """In the order of the benchmark; cases it no longer has, last."""
        present = {case for case, row_mode, _, metric in self.latest if row_mode == mode and metric == "time"}
        return [name for name in self.known_cases if name in present] + sorted(present - set(self.known_cases))

    def sparse_modes(self, case: str) -> list[str]:
        modes = {m for c, m, p, metric in self.latest if c == case and m.startswith("sparsity ") and p == OURS}
        return sorted(modes, key=lambda mode: float(mode.split()[1]))

    def sources(self) -> str:
        """With what and when, in a sentence."""
        timed = [row for row in self.latest.values() if row.metric in ("time", "host_time")]
        parts = []
        for name, label in (("driver", "driver"), ("torch", "PyTorch"), ("cutlass_dsl", "CuTe-DSL"),
                            ("commit", "commit")):  # fmt: skip
            values = sorted({getattr(row, name) for row in timed})
            parts.append(f"{label} {', '.join(values)}")
        days = sorted({row.time[:10] for row in timed})
        if days:
            parts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
        return "; ".join(parts)


# ---- Tables --------------------------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ruler, *lines])


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def dense_table(measured: Measured) -> str:
    """TFLOP/s, or TB/s of decode: the best of a line in bold (a copy is a roof, no rival), and the clock it ran at."""
    metric, form = ("bandwidth", ".2f") if measured.op == "decode" else ("rate", ".0f")
    names = measured.providers(["dense"])
    lines = []
    for case in measured.cases("dense"):
        rates = {name: measured.value(case, "dense", name, metric) for name in names}
        best = max((rate for name, rate in rates.items() if rate is not None and name != decode.COPY), default=None)
        cells = [f"**{rate:{form}}**" if rate is not None and rate == best and name != decode.COPY else
                 number(rate, form) for name, rate in rates.items()]  # fmt: skip
        clock = measured.value(case, "dense", "gpu", "sm_clock")
        lines.append([case, *cells, number(measured.value(case, "dense", OURS, "time"), ".3f"), number(clock, ".0f")])
    return table([rows.UNITS[metric], *names, f"{OURS}, ms", "SM clock, MHz"], lines)


def sparsity_table(measured: Measured, case: str) -> str:
    """Times and speed-ups over our own dense kernel and over the fastest dense peer, in the same run."""
    dense = measured.value(case, "structured, dense", OURS, "time")
    peer = fastest_peer(measured, case)
    head = ["wished", "skipped", "lambda", "ms", "of our dense", f"of {peer[0]}" if peer else "of a peer",
            "error, same tiles", "error, all tiles"]  # fmt: skip
    lines = [["dense", "0%", "", number(dense, ".3f"), "1.00", ratio(peer, dense), "", ""]]
    for mode in measured.sparse_modes(case):
        def read(metric: str, mode: str = mode) -> float | None:
            return measured.value(case, mode, OURS, metric)

        ms = read("time")
        lines.append([
            mode.split()[1], number(read("sparsity"), ".1%"), number(read("threshold"), ".2g"), number(ms, ".3f"),
            number(dense / ms if ms and dense else None, ".2f"), ratio(peer, ms), number(read("error"), ".1e"),
            number(read("error_dense"), ".1e"),
        ])  # fmt: skip
    return table(head, lines)


def fastest_peer(measured: Measured, case: str) -> tuple[str, float] | None:
    times = {name: measured.value(case, "structured, dense", name, "time") for name in measured.peers
             if name != decode.COPY}  # fmt: skip
    return min(((name, ms) for name, ms in times.items() if ms is not None), key=lambda item: item[1], default=None)


def ratio(peer: tuple[str, float] | None, ms: float | None) -> str:
    return f"{peer[1] / ms:.2f}" if peer and ms else ""


def host_table(measured: Measured) -> str:
    """What a call costs the host, by mode; of a warm call the median and, in brackets, the 80th percentile."""
    lines = []
    for case, mode in dict.fromkeys((case, mode) for case, mode, _, _ in measured.latest):
        def read(metric: str, case: str = case, mode: str = mode) -> float | None:
            return measured.value(case, mode, OURS, metric)

        warm = measured.latest.get((case, mode, OURS, "host_time"))
        first = read("first_call")
        lines.append([
            f"{case}, {mode}", number(read("import"), ".2f"), number(first and first * 1e3, ".0f"),
            f"{warm.p50:.1f} ({warm.p80:.1f})" if warm else "",
        ])  # fmt: skip
    return table(["case", "imports, s", "first call, ms", "warm call, us"], lines)


def tables(measured: Measured) -> str:
    protocol = "profiling/host.py" if measured.op == "host" else "profiling/bench.py"
    parts = [f"### {measured.gpu}, {measured.op}", f"{measured.sources()}. Medians; protocol in `{protocol}`."]
    if measured.op == "host":
        parts.append(host_table(measured))
    if measured.cases("dense"):
        parts += ["Dense, random input, BF16:", dense_table(measured)]
    for case in measured.cases("structured, dense"):
        parts += [f"Skipping, structured input, `{case}`:", sparsity_table(measured, case)]
    return "\n\n".join(parts) + "\n"


def between_marks(text: str, content: str) -> str:
    """The text with what stands between the marks replaced. Raises ValueError where they are not there, in order."""
    begin, end = text.find(MARK_BEGIN), text.find(MARK_END)
    if begin < 0 or end < begin:
        raise ValueError(f"no line {MARK_BEGIN} with a line {MARK_END} below it")
    return f"{text[: begin + len(MARK_BEGIN)]}\n{content}{text[end:]}"


# ---- Plots ---------------------------------------------------------------------------------------------------------


def least_bytes(shape: Shape) -> int:
    """Q, K, V read once and the output written once, 16 bits each."""
    q_and_out = shape.heads_q * (shape.head_dim + shape.head_dim_v)
    k_and_v = shape.heads_kv * (shape.head_dim + shape.head_dim_v)
    return 2 * shape.batch * shape.seqlen * (q_and_out + k_and_v)


def plots(measured: Measured, folder: Path) -> list[Path]:
    """The files written. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    written = []
    for name, draw in DRAWINGS[measured.op].items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        if draw(measured, axes):
            axes.grid(alpha=0.3)
            axes.legend()
            for ending in ("png", "svg"):
                written.append(folder / f"{name}.{ending}")
                figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def draw_rates(measured: Measured, axes) -> bool:
    """Head dim 128, by length; causal solid, full dashed."""
    drawn = False
    for mask, style in (("causal", "o-"), ("full", "s--")):
        cases = [(CASES[name].seqlen, name) for name in measured.cases("dense")
                 if name in CASES and name.startswith("d128-") and name.endswith(mask)]  # fmt: skip
        for index, provider in enumerate(measured.providers(["dense"])):
            points = [(seqlen, measured.value(name, "dense", provider, "rate")) for seqlen, name in sorted(cases)]
            points = [point for point in points if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=f"{provider}, {mask}")
                drawn = True
    axes.set_xscale("log", base=2)
    axes.set(xlabel="sequence length", ylabel="TFLOP/s", title=f"{measured.gpu}: head dim 128, BF16, dense")
    return drawn


def draw_bandwidth(measured: Measured, axes) -> bool:
    """By the bytes of K and V; contiguous caches solid, paged ones dashed."""
    drawn = False
    for (index, provider), paged in itertools.product(enumerate(measured.providers(["dense"])), (False, True)):
        points = []
        for case in measured.cases("dense"):
            shape, value = decode.CASES.get(case), measured.value(case, "dense", provider, "bandwidth")
            if shape is not None and value is not None and bool(shape.page_size) == paged:
                points.append((shape.kv_bytes, value))
        if points:
            label = f"{provider}{', paged' if paged else ''}"
            axes.plot(*zip(*sorted(points), strict=True), "s--" if paged else "o-", color=f"C{index}", label=label)
            drawn = True
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes of K and V", ylabel="TB/s", title=f"{measured.gpu}: decode, BF16, dense")
    return drawn


def draw_sparsity(measured: Measured, axes) -> bool:
    drawn = False
    for index, case in enumerate(measured.cases("structured, dense")):
        dense = measured.value(case, "structured, dense", OURS, "time")
        peer = fastest_peer(measured, case)
        points = [
            (measured.value(case, mode, OURS, "sparsity"), measured.value(case, mode, OURS, "time"))
            for mode in measured.sparse_modes(case)
        ]
        points = sorted(point for point in points if None not in point)
        if not points or dense is None:
            continue
        drawn = True
        shares = [share for share, _ in points]
        axes.plot(shares, [dense / ms for _, ms in points], "o-", color=f"C{index}", label=f"{case}, of our dense")
        if peer:
            label = f"{case}, of {peer[0]} dense"
            axes.plot(shares, [peer[1] / ms for _, ms in points], "s--", color=f"C{index}", label=label)
    line = [share / 100 for share in range(0, 101)]
    axes.plot(line, [1 / (1 - share / CEILING) for share in line], ":", color="grey", label="P V free where skipped")
    axes.axhline(CEILING, color="grey", lw=1)
    axes.set(xlabel="share of tiles skipped", ylabel="speed-up", title=f"{measured.gpu}: skipping, structured input")
    return drawn


def draw_roofline(measured: Measured, axes) -> bool:
    drawn = False
    for index, provider in enumerate(measured.providers(["dense"])):
        points = []
        for case in measured.cases("dense"):
            rate = measured.value(case, "dense", provider, "rate")
            if rate is not None and case in CASES:
                points.append((flops(CASES[case]) / least_bytes(CASES[case]), rate))
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o", color=f"C{index}", label=provider)
            drawn = True
    if measured.gpu in ROOFS:
        terabytes, teraflops = ROOFS[measured.gpu]
        intensities = [10 ** (exponent / 20) for exponent in range(20, 100)]
        roof = [min(teraflops, terabytes * intensity) for intensity in intensities]
        axes.plot(intensities, roof, color="grey", label="measured copy and matrix product")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="FLOP per byte of Q, K, V and output", ylabel="TFLOP/s", title=f"{measured.gpu}: dense, BF16")
    return drawn


DRAWINGS = {
    "prefill": {"rate": draw_rates, "sparsity": draw_sparsity, "roofline": draw_roofline},
    "decode": {"decode-bandwidth": draw_bandwidth, "decode-sparsity": draw_sparsity},
    "host": {},
}


# ---- The command ---------------------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """Writes a folder's README.md and plots; the tables. Raises FileNotFoundError where it has no rows."""
    files = {op: folder / f"{op}.jsonl" for op in OPS}
    present = [op for op, path in files.items() if path.exists() and path.stat().st_size]
    if not present:
        raise FileNotFoundError(f"{folder} has no rows in any of {', '.join(path.name for path in files.values())}")
    measured = [Measured(rows.read(files[op]), op) for op in present]
    content = "\n".join(tables(one) for one in measured)
    pictures: list[Path] = []
    try:
        pictures = [picture for one in measured for picture in plots(one, folder / "plots")]
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
    images = "".join(f"\n![{path.stem}](plots/{path.name})\n" for path in pictures if path.suffix == ".svg")
    (folder / "README.md").write_text(content + images)
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="with rows; default: profiling/results/*")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted({path.parent for path in rows.RESULTS.glob("*/*.jsonl")})
    if not folders:
        print(f"report.py: no rows in {rows.RESULTS}: measure with make gpu-check", file=sys.stderr)
        return 2
    try:
        content = "\n".join(report(folder) for folder in folders)
        print(content)
        if not options.folders and MARK_BEGIN in README.read_text():
            README.write_text(between_marks(README.read_text(), content))
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
