"""From scores to a threshold: which lambda skips the wished fraction of tiles, on the geometry that a kernel uses.

BLASST's model (arXiv 2512.12087): lambda = a * exp(b * sparsity) / seqlen_k, with a and b per model and per phase.
Here they are fitted to measured pairs (scale factor = lambda * seqlen_k, sparsity): ln(scale factor) is linear in the
sparsity, so a and b come from a least-squares line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cute_sparse import reference
from cute_sparse.problem import TileGeometry
from cute_sparse.threshold import threshold_from_model, threshold_from_scale_factor

SCALE_FACTORS = tuple(float(2.0**exponent) for exponent in range(-6, 15))
FORMAT = 1


class Sample(NamedTuple):
    """One layer's q (batch, seqlen_q, heads_q, head_dim) and k (batch, seqlen_k, heads_kv, head_dim), as attended."""

    q: torch.Tensor
    k: torch.Tensor
    softmax_scale: float
    causal: bool = True


class Point(NamedTuple):
    """sparsity: skipped over visited tiles, over all samples, with lambda = scale_factor / seqlen_k for each."""

    scale_factor: float
    sparsity: float


@dataclass(frozen=True)
class ThresholdModel:
    """lambda = a * exp(b * target_sparsity) / seqlen_k, and where it was fitted.

    geometry    the kernel's tiles; larger ones are negligible less often, so a model holds for its geometry alone
    sparsities  the lowest and the highest sparsity among the fitted points; outside, the line is an extrapolation
    residual    root mean square error of the fitted points' ln(scale factor)
    """

    a: float
    b: float
    geometry: TileGeometry
    sparsities: tuple[float, float]
    residual: float

    def threshold(self, target_sparsity: float, seqlen_k: int | torch.Tensor) -> float | torch.Tensor:
        """lambda for a target, for `attention`. Raises ValueError outside the sparsities that were fitted."""
        low, high = self.sparsities
        if not low <= target_sparsity <= high:
            raise ValueError(f"{target_sparsity=} is outside the calibrated sparsities, {low:.3f} to {high:.3f}")
        return threshold_from_model(self.a, self.b, target_sparsity, seqlen_k)


class Report(NamedTuple):
    """Target against achieved sparsity of one sample."""

    seqlen_k: int
    threshold: float
    target: float
    achieved: float


def measure(
    samples: Iterable[Sample], geometry: TileGeometry, scale_factors: Sequence[float] = SCALE_FACTORS
) -> list[Point]:
    """The sparsity that each scale factor gives over the samples, by the oracle's decisions."""
    skipped = [0] * len(scale_factors)
    visited = 0
    for sample in samples:
        for index, factor in enumerate(scale_factors):
            kept, seen = _tiles(sample, geometry, threshold_from_scale_factor(factor, sample.k.shape[1]))
            skipped[index] += seen - kept
        visited += seen
    if not visited:
        raise ValueError("the samples have no tile to visit")
    return [Point(factor, count / visited) for factor, count in zip(scale_factors, skipped, strict=True)]


def fit(points: Sequence[Point], geometry: TileGeometry) -> ThresholdModel:
    """The least-squares line through (sparsity, ln(scale factor)), over the points where some but not all is skipped.

    Raises ValueError with fewer than three points to fit, or where the sparsity does not vary.
    """
    highest = max((point.sparsity for point in points), default=0.0)
    # At the ends the sparsity no longer follows the factor: nothing is skipped, or all that can be.
    inner = [point for point in points if 0.0 < point.sparsity < highest]
    if len(inner) < 3 or len({point.sparsity for point in inner}) < 2:
        raise ValueError(f"{len(inner)} of {len(points)} points have a sparsity between the ends; a fit needs three")
    x = torch.tensor([point.sparsity for point in inner], dtype=torch.float64)
    y = torch.tensor([point.scale_factor for point in inner], dtype=torch.float64).log()
    b = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    log_a = y.mean() - b * x.mean()
    residual = (log_a + b * x - y).square().mean().sqrt()
    return ThresholdModel(math.exp(log_a), b.item(), geometry, (x.min().item(), x.max().item()), residual.item())


def calibrate(
    samples: Sequence[Sample], geometry: TileGeometry, scale_factors: Sequence[float] = SCALE_FACTORS
) -> ThresholdModel:
    """`fit` to what `measure` finds."""
    return fit(measure(samples, geometry, scale_factors), geometry)


def report(model: ThresholdModel, samples: Iterable[Sample], target_sparsity: float) -> list[Report]:
    """What the model's threshold achieves on each sample; use others than those it was fitted to."""
    rows = []
    for sample in samples:
        seqlen_k = sample.k.shape[1]
        threshold = model.threshold(target_sparsity, seqlen_k)
        kept, visited = _tiles(sample, model.geometry, threshold)
        rows.append(Report(seqlen_k, threshold, target_sparsity, 1 - kept / visited if visited else 0.0))
    return rows


def save(model: ThresholdModel, path: str | Path) -> None:
    Path(path).write_text(json.dumps({"format": FORMAT, **asdict(model)}, indent=2) + "\n")


def load(path: str | Path) -> ThresholdModel:
    """Raises ValueError where the file is not one that `save` wrote."""
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        geometry = TileGeometry(**content.pop("geometry"))
        return ThresholdModel(geometry=geometry, sparsities=tuple(content.pop("sparsities")), **content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a threshold model that this version saved: {error!r}") from error


def _tiles(sample: Sample, geometry: TileGeometry, threshold: float) -> tuple[int, int]:
    """(kept, visited) tiles; V does not matter to the decisions."""
    decided = reference.attention(
        sample.q,
        sample.k,
        sample.k[..., :1],
        softmax_scale=sample.softmax_scale,
        window_right=0 if sample.causal else None,
        threshold=torch.tensor(threshold),
        geometry=geometry,
        dtype=torch.float32,
    )
    kept, visited = decided.tile_counts.sum(dim=(1, 2)).tolist()
    return kept, visited
