"""The threshold model: fitted on a kernel's geometry, it achieves its target on inputs that it has not seen."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cute_sparse import calibration
from cute_sparse.calibration import Point, Sample
from cute_sparse.problem import TileGeometry

GEOMETRY = TileGeometry(tile_m=32, tile_rows=16, tile_n=16)
FACTORS = [2.0**exponent for exponent in range(-2, 10)]


def sample(seqlen: int, seed: int, heads: int = 4) -> Sample:
    """Scores that fall off with distance, at a pace of their own in each head."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(seqlen)[:, None] * 1000.0 ** (-torch.arange(8) / 8)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)[None, :, None] * 1.5
    paces = torch.linspace(0.2, 1.5, heads)[None, None, :, None]
    q, k = (torch.randn(1, seqlen, heads, 16, generator=generator) * 0.5 for _ in range(2))
    return Sample(q + rotary * paces, k + rotary, softmax_scale=1.0)


def test_the_fit_finds_the_line_it_was_given():
    points = [Point(7.93 * math.exp(8.61 * s), s) for s in (0.1, 0.2, 0.35, 0.5, 0.8)]
    model = calibration.fit([Point(1e-9, 0.0), *points, Point(1e9, 0.9)], GEOMETRY)
    assert model.a == pytest.approx(7.93) and model.b == pytest.approx(8.61)
    assert model.residual < 1e-9 and model.sparsities == (0.1, 0.8)
    assert model.threshold(0.5, 65536) == pytest.approx(7.93 * math.exp(8.61 * 0.5) / 65536)


def test_more_is_skipped_with_a_larger_factor():
    points = calibration.measure([sample(160, 0), sample(224, 1)], GEOMETRY, FACTORS)
    sparsities = [point.sparsity for point in points]
    assert sparsities == sorted(sparsities) and sparsities[0] < 0.1 < 0.5 < sparsities[-1]


def test_a_calibrated_target_is_achieved_on_unseen_inputs():
    fitted = [sample(length, seed) for seed, length in enumerate((192, 256, 320))]
    model = calibration.calibrate(fitted, GEOMETRY, FACTORS)
    rows = calibration.report(model, [sample(length, 100 + length) for length in (224, 288)], 0.5)
    assert [row.seqlen_k for row in rows] == [224, 288]
    for row in rows:
        assert row.target == 0.5 and abs(row.achieved - 0.5) < 0.12, row
    # The distance is not by chance: another target is missed by as much as the targets differ.
    other = calibration.report(model, [sample(288, 7)], 0.3)[0]
    assert other.achieved < 0.42


def test_the_geometry_matters():
    samples = [sample(256, 0)]
    small = calibration.measure(samples, GEOMETRY, [8.0])[0].sparsity
    large = calibration.measure(samples, TileGeometry(128, 64, 64), [8.0])[0].sparsity
    assert large < small


def test_saved_and_loaded(tmp_path):
    model = calibration.calibrate([sample(160, 0)], GEOMETRY, FACTORS)
    calibration.save(model, tmp_path / "model.json")
    assert calibration.load(tmp_path / "model.json") == model


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "a": 1.0}'])
def test_what_was_not_saved_here_is_refused(tmp_path, content):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match="model.json is not a threshold model"):
        calibration.load(tmp_path / "model.json")


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="1 of 3 points"):
        calibration.fit([Point(1.0, 0.0), Point(2.0, 0.5), Point(4.0, 0.9)], GEOMETRY)
    with pytest.raises(ValueError, match="no tile"):
        calibration.measure([], GEOMETRY)
    model = calibration.calibrate([sample(160, 0)], GEOMETRY, FACTORS)
    with pytest.raises(ValueError, match="outside the calibrated"):
        model.threshold(0.999, 1024)
    with pytest.raises(ValueError, match="outside the calibrated"):
        dataclasses.replace(model, sparsities=(0.4, 0.6)).threshold(0.3, 1024)
