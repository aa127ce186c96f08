"""From scores to a threshold: which lambda skips the wished fraction of tiles, on the geometry that a kernel uses.

BLASST's model (arXiv 2512.12087): lambda = a * exp(b * sparsity) / seqlen_k, with a and b per model and per phase,
prefill or decode. Here they are fitted to measured pairs (scale factor = lambda * seqlen_k, sparsity): ln(scale factor)
is linear in the sparsity, so a and b come from a least-squares line.

The pairs come from queries and keys (`calibrate`), with the geometry in the `stats` that a call of that kind returns,
or from calls themselves: `point` turns the tile counts of a model's layers into a pair, and `fit` takes such pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cute_sparse import reference
from cute_sparse.problem import TileGeometry
from cute_sparse.threshold import threshold_from_model, threshold_from_scale_factor

SCALE_FACTORS = tuple(float(2.0**exponent) for exponent in range(-6, 15))
FORMAT = 2
FORMULA = "a * exp(b * target_sparsity)"  # as Model Optimizer writes it
ALGORITHM = "skip_softmax"  # of a group of layers; others' coefficients mean something else
PHASES = ("prefill", "decode")

Phase = Literal["prefill", "decode"]


class Sample(NamedTuple):
    """One layer's queries and keys, as attended: rotary positions applied.

    q, k         (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_kv, head_dim), queries the last tokens
    window_left  keys before a query's own that it sees, None: all
    softcap      as in `attention`
    phase        "prefill": each query head decides for itself, as `attention` does; "decode": all query heads of a KV
                 head together, as `decode` does, q a decode step
    num_splits   of decode: each part has a running maximum of its own, which begins with those of two tiles
    """

    q: torch.Tensor
    k: torch.Tensor
    softmax_scale: float
    causal: bool = True
    window_left: int | None = None
    softcap: float = 0.0
    phase: Phase = "prefill"
    num_splits: int = 1


class Point(NamedTuple):
    """sparsity: skipped over visited tiles, over all samples, with lambda = scale_factor / seqlen_k for each."""

    scale_factor: float
    sparsity: float


@dataclass(frozen=True)
class ThresholdModel:
    """lambda = a * exp(b * target_sparsity) / seqlen_k, and where it was fitted.

    phase       "prefill" or "decode"
    geometry    the kernel's tiles; larger ones are negligible less often, so a model holds for its geometry alone.
                None: not known
    sparsities  the lowest and the highest sparsity among the fitted points; outside, the line is an extrapolation
    residual    root mean square error of the fitted points' ln(scale factor), None: not known
    """

    a: float
    b: float
    phase: Phase
    geometry: TileGeometry | None
    sparsities: tuple[float, float]
    residual: float | None

    def threshold(self, target_sparsity: float, seqlen_k: int | torch.Tensor) -> float | torch.Tensor:
        """lambda for a target, as `attention` or `decode` take it. ValueError outside the sparsities that were fitted.

        seqlen_k  as in `threshold_from_scale_factor`
        """
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


def point(scale_factor: float, tile_counts: Iterable[torch.Tensor]) -> Point:
    """The pair that calls give whose lambda was `threshold_from_scale_factor(scale_factor, seqlen_k)`.

    tile_counts  of their `stats`, (2, batch, heads) each
    """
    counts = [each.sum(dim=(1, 2)).tolist() for each in tile_counts]
    kept, visited = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if not visited:
        raise ValueError("no tile was visited")
    return Point(scale_factor, (visited - kept) / visited)


def measure(
    samples: Iterable[Sample], geometry: TileGeometry, scale_factors: Sequence[float] = SCALE_FACTORS
) -> list[Point]:
    """The sparsity that each scale factor gives over the samples, by the oracle's decisions."""
    counts: list[list[torch.Tensor]] = [[] for _ in scale_factors]
    for sample in samples:
        for factor, of_factor in zip(scale_factors, counts, strict=True):
            threshold = threshold_from_scale_factor(factor, sample.k.shape[1])
            of_factor.append(_tile_counts(sample, geometry, threshold))
    return [point(factor, of_factor) for factor, of_factor in zip(scale_factors, counts, strict=True)]


def fit(points: Sequence[Point], geometry: TileGeometry, phase: Phase = "prefill") -> ThresholdModel:
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
    sparsities = x.min().item(), x.max().item()
    return ThresholdModel(math.exp(log_a), b.item(), phase, geometry, sparsities, residual.item())


def calibrate(
    samples: Sequence[Sample], geometry: TileGeometry, scale_factors: Sequence[float] = SCALE_FACTORS
) -> ThresholdModel:
    """`fit` to what `measure` finds. The samples are of one phase."""
    phases = {sample.phase for sample in samples}
    if len(phases) != 1 or not phases <= set(PHASES):
        raise ValueError(f"the samples' phases are {sorted(phases)}; they must all be one of {', '.join(PHASES)}")
    return fit(measure(samples, geometry, scale_factors), geometry, phases.pop())


def report(
    model: ThresholdModel, samples: Iterable[Sample], target_sparsity: float, geometry: TileGeometry | None = None
) -> list[Report]:
    """What the model's threshold achieves on each sample; use others than those it was fitted to.

    geometry  of the kernel that will run, where it is not the model's, or the model's is not known
    """
    geometry = model.geometry if geometry is None else geometry
    if geometry is None:
        raise ValueError("the model's geometry is not known; give that of the kernel that will run")
    rows = []
    for sample in samples:
        if sample.phase != model.phase:
            raise ValueError(f"a sample of {sample.phase} for a model of {model.phase}")
        seqlen_k = sample.k.shape[1]
        threshold = model.threshold(target_sparsity, seqlen_k)
        achieved = point(threshold * seqlen_k, [_tile_counts(sample, geometry, threshold)]).sparsity
        rows.append(Report(seqlen_k, threshold, target_sparsity, achieved))
    return rows


def save(model: ThresholdModel, path: str | Path) -> None:
    Path(path).write_text(json.dumps({"format": FORMAT, **asdict(model)}, indent=2) + "\n")


def load(path: str | Path) -> ThresholdModel:
    """Raises ValueError where the file is not one that `save` wrote."""
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        geometry = content.pop("geometry")
        geometry = None if geometry is None else TileGeometry(**geometry)
        return ThresholdModel(geometry=geometry, sparsities=tuple(content.pop("sparsities")), **content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a threshold model that this version saved: {error!r}") from error


class Checkpoint(NamedTuple):
    """What the config.json of a checkpoint says that NVIDIA Model Optimizer calibrated.

    models    by phase
    targets   target sparsity by phase, empty where the checkpoint names none
    ignore    patterns (fnmatch) of the layers that stay dense: give them no threshold, as
              `integrations.transformers.keep_dense` sees to
    """

    models: dict[Phase, ThresholdModel]
    targets: dict[Phase, float]
    ignore: tuple[str, ...]


def load_model_optimizer(path: str | Path) -> Checkpoint:
    """The threshold models in a checkpoint's config.json, under `sparse_attention_config`.

    They were fitted on that tool's tiles: `report` says what they achieve on ours. Raises ValueError where there is no
    skip-softmax calibration, more than one, or one with another formula than a * exp(b * target_sparsity).
    """
    try:
        section = json.loads(Path(path).read_text())["sparse_attention_config"]
        # Older versions wrote the calibration beside the groups, and the target by another name.
        places = [section, *section.get("config_groups", {}).values()]
        places = [place for place in places if place.get("algorithm", ALGORITHM) == ALGORITHM]
        (place,) = (place for place in places if isinstance(place.get("threshold_scale_factor"), dict))
        if place.get("initial_disabled_steps"):
            raise ValueError("initial_disabled_steps, of a diffusion model, is not supported")
        fitted, target = place["threshold_scale_factor"], place.get("target_sparsity", place.get("target_sparse_ratio"))
        if fitted.get("formula", FORMULA) != FORMULA:
            raise ValueError(f"the formula is {fitted['formula']!r}, not {FORMULA!r}")
        models = {
            phase: ThresholdModel(float(fitted[phase]["a"]), float(fitted[phase]["b"]), phase, None, (0.0, 1.0), None)
            for phase in PHASES
            if phase in fitted
        }
        if not models:
            raise ValueError("no coefficients a and b of prefill or decode")
        targets = {} if target is None else target if isinstance(target, dict) else dict.fromkeys(models, target)
        return Checkpoint(models, {phase: float(targets[phase]) for phase in models if phase in targets},
                          tuple(place.get("ignore", ())))  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no calibrated skip-softmax attention: {error!r}") from error


def _tile_counts(sample: Sample, geometry: TileGeometry, threshold: float) -> torch.Tensor:
    """int32 (2, batch, heads): kept, visited; V does not matter to the decisions."""
    options = dict(
        softmax_scale=sample.softmax_scale,
        window_left=sample.window_left,
        window_right=0 if sample.causal else None,
        softcap=sample.softcap,
        threshold=torch.tensor(threshold),
        geometry=geometry,
        dtype=torch.float32,
    )
    v = sample.k[..., :1]
    if sample.phase == "prefill":
        return reference.attention(sample.q, sample.k, v, **options).tile_counts
    lengths = [sample.k.shape[1]] * sample.k.shape[0]
    return reference.decode(
        sample.q, sample.k, v, seqused_k=lengths, num_splits=sample.num_splits, **options
    ).tile_counts
