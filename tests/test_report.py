"""Tables and plots, from rows that are made up."""

from __future__ import annotations

import math
import re

import pytest

from profiling import bench, report, rows
from profiling.bench import OURS
from profiling.peers import Shape

ORIGIN = rows.Origin("NVIDIA H200", "580.1", "2.13", "4.8.1", "abc", "2026-01-01T00:00:00+00:00")
LATER = rows.Origin("NVIDIA H200", "580.1", "2.13", "4.8.1", "abd", "2026-01-02T00:00:00+00:00")
LONG = "d128-64k-causal"
PAGED = "b8-32k-32q8kv-pages"


def row(provider, case, mode, metric, value, origin=ORIGIN, op="prefill") -> rows.Row:
    return rows.row(origin, op, provider, case, mode, metric, (value, value, value))


def made_up_decode() -> list[rows.Row]:
    found = []
    for provider, bandwidth in (("copy", 4.3), ("fa4", 3.9), ("cute_sparse", 4.1)):
        found.append(row(provider, PAGED, "dense", "bandwidth", bandwidth, op="decode"))
        found.append(row(provider, PAGED, "dense", "time", 1 / bandwidth, op="decode"))
        found.append(row(provider, PAGED, "structured, dense", "time", 1 / bandwidth, op="decode"))
    skipping = {"time": 0.125, "sparsity": 0.9, "threshold": 0.01, "error": 2e-3, "error_dense": 3e-3}
    for metric, value in skipping.items():
        found.append(row("cute_sparse", PAGED, "sparsity 0.9", metric, value, op="decode"))
    return found


def made_up_host() -> list[rows.Row]:
    values = {"import": 1.25, "first_call": 0.042, "host_time": 9.5}
    return [row("cute_sparse", "1x64", "dense, disk", metric, value, op="host") for metric, value in values.items()]


def made_up() -> list[rows.Row]:
    found = []
    for case, ours, fa4 in (("d128-8k-causal", 700.0, 675.0), ("d128-2k-causal", 500.0, 522.4)):
        for provider, rate in (("fa4", fa4), ("cute_sparse", ours)):
            found.append(row(provider, case, "dense", "rate", rate))
            found.append(row(provider, case, "dense", "time", bench.flops(bench.CASES[case]) / rate / 1e9))
        found += [row("gpu", case, "dense", "sm_clock", 1755.0), row("gpu", case, "dense", "power", 690.0)]
    found += [row(OURS, LONG, "structured, dense", "time", 60.0), row("fa4", LONG, "structured, dense", "time",
                                                                               66.0)]  # fmt: skip
    found.append(row(OURS, LONG, "structured, dense", "error", 1e-3))
    for wished, share, threshold, ms in ((0.75, 0.748, 0.01, 40.0), (0, 0.0, 1e-30, 60.5)):
        mode = f"sparsity {wished:g}"
        values = {"time": ms, "sparsity": share, "threshold": threshold, "error": 2e-3, "error_dense": 3e-3}
        found += [row("cute_sparse", LONG, mode, metric, value) for metric, value in values.items()]
    return found


def test_the_dense_table_has_the_cases_in_order_and_the_best_in_bold_and_how_far_ours_is_from_the_best_peer():
    slower = [row("cudnn", "d128-8k-causal", "dense", "time", 100.0)]
    lines = report.dense_table(report.Measured(made_up() + slower)).splitlines()
    head = "| TFLOP/s | cute_sparse | cudnn | fa4 | of the best peer | cute_sparse, ms | SM clock, MHz | power, W |"
    assert lines[0] == head
    assert lines[2].startswith("| d128-2k-causal | 500 |  | **522** | 0.96 | 0.")
    assert lines[3].startswith("| d128-8k-causal | **700** |  | 675 | 1.04 |") and lines[3].endswith("| 1755 | 690 |")
    assert len(lines) == 4


def test_the_sparsity_table_has_both_speed_ups():
    lines = report.sparsity_table(report.Measured(made_up()), LONG).splitlines()
    assert "of our dense | of fa4" in lines[0]
    assert lines[2] == "| dense | 0% |  | 60.000 | 1.00 | 1.10 | 1.0e-03 | 1.0e-03 |"
    assert lines[3] == "| 0 | 0.0% | 1e-30 | 60.500 | 0.99 | 1.09 | 2.0e-03 | 3.0e-03 |"
    assert lines[4] == "| 0.75 | 74.8% | 0.01 | 40.000 | 1.50 | 1.65 | 2.0e-03 | 3.0e-03 |"


def test_a_speed_up_is_of_one_run():
    """The second run timed our kernel and FlexAttention alone, on a GPU that was slower by then."""
    later = [
        row(provider, LONG, mode, "time", ms, LATER)
        for provider, mode, ms in (
            (OURS, "structured, dense", 80.0), (OURS, "sparsity 0.75", 50.0), ("flex", "sparsity 0.75", 100.0)
        )
    ]  # fmt: skip
    lines = report.sparsity_table(report.Measured([*made_up(), *later]), LONG).splitlines()
    assert "| ms | of our dense | of fa4 | of flex, same tiles |" in lines[0]
    assert lines[2].startswith("| dense | 0% |  | 80.000 | 1.00 | 1.10 |  |")
    assert lines[4].startswith("| 0.75 | 74.8% | 0.01 | 50.000 | 1.60 | 1.65 | 2.00 |")


def test_the_latest_of_a_measurement_counts_in_whatever_order_they_come():
    later = row("cute_sparse", "d128-8k-causal", "dense", "rate", 720.0, LATER)
    for all_rows in ([later, *made_up()], [*made_up(), later]):
        assert report.Measured(all_rows).value("d128-8k-causal", "dense", "cute_sparse", "rate") == 720.0


def test_what_was_not_measured_is_empty():
    only = [r for r in made_up() if not (r.provider == "fa4" and (r.case == LONG or r.case == "d128-8k-causal"))]
    measured = report.Measured(only)
    assert "| d128-8k-causal | **700** |  |" in report.dense_table(measured)
    assert "of a peer" in report.sparsity_table(measured, LONG)


def test_rows_of_two_gpus_or_none_are_refused():
    other = rows.Origin("NVIDIA H100", "580.1", "2.13", "4.8.1", "abc", "2026-01-01T00:00:00+00:00")
    with pytest.raises(ValueError, match="NVIDIA H100, NVIDIA H200"):
        report.Measured([*made_up(), row("fa4", LONG, "dense", "time", 1.0, other)])
    with pytest.raises(ValueError, match="no rows"):
        report.Measured([])


def test_only_what_stands_between_the_marks_is_replaced():
    text = f"before\n{report.MARK_BEGIN}\nold\n{report.MARK_END}\nafter\n"
    once = report.between_marks(text, "new\n")
    assert once == f"before\n{report.MARK_BEGIN}\nnew\n{report.MARK_END}\nafter\n"
    assert report.between_marks(once, "new\n") == once
    with pytest.raises(ValueError, match="no line"):
        report.between_marks(f"{report.MARK_END}{report.MARK_BEGIN}", "new")


def test_a_copy_is_a_roof_and_no_rival():
    measured = report.Measured(made_up_decode(), "decode")
    lines = report.dense_table(measured).splitlines()
    assert lines[0].startswith("| TB/s | cute_sparse | copy | fa4 |")
    assert lines[2].startswith(f"| {PAGED} | **4.10** | 4.30 | 3.90 | 0.95 |")
    assert "of fa4" in report.sparsity_table(measured, PAGED).splitlines()[0]
    assert "| 0.9 | 90.0% | 0.01 | 0.125 | 1.95 | 2.05 |" in report.sparsity_table(measured, PAGED)


def test_the_host_table_has_seconds_milliseconds_and_microseconds():
    lines = report.host_table(report.Measured(made_up_host(), "host")).splitlines()
    assert lines[2] == "| 1x64, dense, disk | 1.25 | 42 | 9.5 (9.5) |"


def test_rows_of_another_operation_are_refused():
    with pytest.raises(ValueError, match="rows of host where those of decode"):
        report.Measured(made_up_host(), "decode")


def test_a_folder_has_what_was_measured_of_every_operation(tmp_path):
    for op, all_rows in (("prefill", made_up()), ("decode", made_up_decode()), ("host", made_up_host())):
        write(tmp_path, all_rows, op)
    content = report.report(tmp_path)
    assert [line for line in content.splitlines() if line.startswith("###")] == [
        "### NVIDIA H200, prefill", "### NVIDIA H200, decode", "### NVIDIA H200, host"
    ]  # fmt: skip
    (tmp_path / "prefill.jsonl").write_text("")  # a run that ended before its first row
    assert "prefill" not in report.report(tmp_path).replace("profiling", "")


def write(folder, all_rows, op="prefill") -> None:
    writer = rows.Writer(folder / f"{op}.jsonl")
    for one in all_rows:
        writer.write(one)


def test_a_folder_gets_its_tables(tmp_path, capsys):
    write(tmp_path, made_up())
    assert report.main([str(tmp_path)]) == 0
    content = (tmp_path / "README.md").read_text()
    assert "| d128-8k-causal | **700** | 675 |" in content and "commit abc; 2026-01-01" in content
    assert "| 0.75 | 74.8% |" in capsys.readouterr().out


def test_plots_are_written_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write(tmp_path, made_up())
    write(tmp_path, made_up_decode(), "decode")
    for_the_project = report.report(tmp_path)
    drawn = ("rate", "sparsity", "roofline", "decode-bandwidth", "decode-sparsity")
    names = {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert pictures.keys() == names
    assert "(plots/rate.svg)" in (tmp_path / "README.md").read_text()
    (shown,) = re.findall(r"\((.*rate\.svg)\)", for_the_project)
    assert (report.README.parent / shown).resolve() == (tmp_path / "plots" / "rate.svg").resolve()
    report.report(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()} == pictures


def test_rows_of_another_schema_and_missing_ones_are_errors(tmp_path, capsys, monkeypatch):
    (tmp_path / "prefill.jsonl").write_text('{"speed": 1}\n')
    assert report.main([str(tmp_path)]) == 2
    assert "prefill.jsonl:1: not a row of this schema" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none")]) == 2
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "empty")
    assert report.main([]) == 2
    assert "measure with make gpu-check" in capsys.readouterr().err


def test_least_bytes_are_each_tensor_once():
    shape = Shape(2, 100, 4, 2, 64, 32, True)
    elements = 2 * 100 * (4 * 64 + 2 * 64 + 2 * 32 + 4 * 32)
    assert report.least_bytes(shape) == 2 * elements
    assert math.isclose(bench.flops(shape) / report.least_bytes(shape), 2 * 96 * 8 * 5000 / (2 * elements))
