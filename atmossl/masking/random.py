"""Masking samplers of pretraining: random tokens, tubes, blocks, time blocks, and mixtures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from atmossl.batch import Corruption, StreamMask
from atmossl.masking.base import (
    MaskingSampler,
    StreamMasks,
    TokenLayout,
    TokenLayouts,
    check_masks,
    coarse_mask,
    hide_times,
    mask_of_points,
    own_factor,
    points_of,
    step_hours_of,
    window_times,
)
from atmossl.settings import Positive, snake_case
from atmossl.value_faults import as_written, listed

_KINDS = {
    "drop": Corruption.DROP,
    "mask": Corruption.MASK,
    "noise": Corruption.NOISE,
    "coarsen": Corruption.COARSEN,
    "keep": Corruption.KEEP,
}


def _check_range(key: str, bounds: Sequence[float]) -> None:
    if len(bounds) != 2 or not 0.0 <= bounds[0] <= bounds[1] <= 1.0:
        raise ValueError(f"{key}={as_written(bounds)} must be two rates, 0 <= low <= high <= 1")


def _check_probability(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key}={value} must be a probability in [0, 1]")


@dataclass(frozen=True)
class RandomMasking:
    """BERT-style masking of tokens (AtmoRep, Lessig et al. 2023; Devlin et al. 2019).

    rate: range of the share of hidden tokens, drawn per sample (and per stream if not `synced`).
    fractions: how hidden tokens are split over `drop`, `mask`, `noise`, `coarsen`, `keep`.
    synced: hide the same air in all streams, in the smallest blocks that are whole tokens of each.
    tube: hide a place at all times or not at all (VideoMAE, Tong et al. 2022).
    hide_level, hide_stream: probability that one whole level of a stream, or one whole stream,
        is masked on top. streams: names of those that it is one of; none: all predicted ones.

    Raises:
        ValueError: `streams` names one that is not predicted, when a mask is drawn.
    """

    rate: tuple[float, float] = (0.5, 0.9)
    fractions: Mapping[str, float] = field(default_factory=lambda: {"mask": 1.0})
    synced: bool = False
    tube: bool = False
    hide_level: float = 0.0
    hide_stream: float = 0.0
    streams: Sequence[str] = ()
    coarsen_factor: int = 2
    noise_std: float = 0.5

    def __post_init__(self) -> None:
        _check_range("masking.rate", self.rate)
        _check_probability("masking.hide_level", self.hide_level)
        _check_probability("masking.hide_stream", self.hide_stream)
        unknown = sorted(set(self.fractions) - set(_KINDS))
        if unknown:
            raise ValueError(
                f"masking.fractions has unknown {listed(unknown)}; valid: {listed(sorted(_KINDS))}"
            )
        total = sum(self.fractions.values())
        if abs(total - 1.0) > 1e-6 or min(self.fractions.values()) < 0:
            raise ValueError(f"masking.fractions must be positive and sum to 1, got {total:g}")

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        common = _common("masking.synced", _token_counts(layouts)) if self.synced else None
        score = rng.random(common) if common else None
        shared_rate = rng.uniform(*self.rate)
        corruptions = []
        for layout in layouts:
            if score is not None:
                hidden = _spread(self._lowest(score, shared_rate), layout)
            else:
                stream_score = rng.random(layout.grid.shape)
                hidden = self._lowest(stream_score, rng.uniform(*self.rate))
            corruptions.append(self._split(hidden, rng))
        self._hide_levels(corruptions, rng)
        self._hide_one_stream(corruptions, layouts, rng)
        return tuple(
            self._mask(layout, layouts, values)
            for layout, values in zip(layouts, corruptions, strict=True)
        )

    def _mask(
        self, layout: TokenLayout, layouts: TokenLayouts, corruption: np.ndarray
    ) -> StreamMask:
        if layout.spec.role != "predict":
            return layout.nothing_hidden()
        values = torch.from_numpy(corruption)
        if Corruption.COARSEN in values:
            factor = own_factor(layout, layouts, self.coarsen_factor)
            return coarse_mask(values, factor, self.noise_std)
        return StreamMask(values, self.coarsen_factor, self.noise_std)

    def _lowest(self, score: np.ndarray, rate: float) -> np.ndarray:
        """True for the lowest scores, as large a share as `rate`; scores that tie (tubes) are
        hidden together."""
        if self.tube:
            score = np.broadcast_to(score[:, :1], score.shape)
        count = round(rate * score.size)
        if count == 0:
            return np.zeros(score.shape, bool)
        return score <= np.partition(score, count - 1, axis=None)[count - 1]

    def _split(self, hidden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        kinds = np.array([int(_KINDS[name]) for name in self.fractions])
        drawn = rng.choice(kinds, size=hidden.shape, p=list(self.fractions.values()))
        return np.where(hidden, drawn, int(Corruption.VISIBLE)).astype(np.int64)

    def _hide_levels(self, corruptions: list[np.ndarray], rng: np.random.Generator) -> None:
        for values in corruptions:
            hide, level = rng.random() < self.hide_level, rng.integers(values.shape[0])
            if hide and values.shape[0] > 1:
                values[level] = int(Corruption.MASK)

    def _hide_one_stream(
        self, corruptions: list[np.ndarray], layouts: TokenLayouts, rng: np.random.Generator
    ) -> None:
        hide, choice = rng.random() < self.hide_stream, rng.random()
        predicted = {x.spec.name: i for i, x in enumerate(layouts) if x.spec.role == "predict"}
        unknown = sorted(set(self.streams) - set(predicted))
        if unknown:
            raise ValueError(
                f"masking.streams has unknown {listed(unknown)}; valid: {listed(sorted(predicted))}"
            )
        if hide and len(layouts) > 1:
            names = list(self.streams or predicted)
            corruptions[predicted[names[int(choice * len(names))]]][:] = int(Corruption.MASK)


def _token_counts(layouts: TokenLayouts) -> dict[str, tuple[int, ...]]:
    """The number of tokens along [level time lat lon] of every predicted stream."""
    return {x.spec.name: x.grid.shape for x in layouts if x.spec.role == "predict"}


def _common(key: str, counts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The number of common blocks along every axis of a window (the last two axes are latitude and
    longitude). Common blocks are the smallest blocks that are whole tokens, or cells, of all
    streams; what is hidden in them is the same air in each stream.

    Raises:
        ValueError: names the key, as streams have no edges in common.
    """
    common = tuple(math.gcd(*axis) for axis in zip(*counts.values(), strict=True))
    lacking = [
        axis
        for number, axis in ((-2, "lat"), (-1, "lon"))
        if common[number] == 1 and max(count[number] for count in counts.values()) > 1
    ]
    if lacking:
        places = {name: count[-2:] for name, count in counts.items()}
        raise ValueError(
            f"{key}: streams have {as_written(places)} tokens of latitude and longitude, without "
            f"an edge in common along {listed(lacking)}; choose token sizes that are multiples of "
            "each other"
        )
    return common


def _spread(blocks: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """The values of common blocks at the tokens of a stream; False for a stream that is not
    predicted."""
    if layout.spec.role != "predict":
        return np.zeros(layout.grid.shape, bool)
    for axis, tokens in enumerate(layout.grid.shape):
        blocks = blocks.repeat(tokens // blocks.shape[axis], axis)
    return blocks


@dataclass(frozen=True)
class BlockMasking:
    """Hide boxes of neighbouring tokens at all times and levels (context encoder, Pathak et al.
    2016; block masking of BEiT and I-JEPA), the same air in every stream: boxes of the smallest
    blocks that are whole tokens of each, or whole cells.

    num_blocks: boxes per sample. share: range of a box's share of the window, per axis.
    cells: boxes end at any cell, as gaps do, and hide tokens in part; at whole tokens otherwise.
    sphere: boxes go on around a circle of longitude that the window closes, and are the wider in
        degrees the nearer to a pole their centre lies, by 1 / cos(latitude), as boxes of equal
        width in kilometres are.
    """

    num_blocks: int = 2
    share: tuple[float, float] = (0.25, 0.5)
    corruption: str = "mask"
    cells: bool = False
    sphere: bool = False

    def __post_init__(self) -> None:
        _check_range("masking.share", self.share)
        if self.corruption not in ("mask", "drop"):
            raise ValueError(f"masking.corruption={as_written(self.corruption)}; valid: mask, drop")
        if self.cells and self.corruption != "mask":
            raise ValueError("masking.corruption=drop takes whole tokens: masking.cells=false")

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        predicted = [layout for layout in layouts if layout.spec.role == "predict"]
        boxes = []
        for _ in range(self.num_blocks):
            size = rng.uniform(*self.share, size=2)
            start = rng.random(2)
            boxes.append(_on_sphere(size, start, predicted) if self.sphere else
                         (size, start * (1 - size)))  # fmt: skip
        counts = {layout.spec.name: self._counts(layout) for layout in predicted}
        hidden = np.zeros(_common("masking", counts), bool)
        for lat, lon in _places(boxes, hidden.shape):
            hidden[np.ix_(lat, lon)] = True
        return tuple(self._mask(layout, hidden) for layout in layouts)

    def _counts(self, layout: TokenLayout) -> tuple[int, ...]:
        """Rows and columns of a stream at whose edges boxes may end."""
        num_lat, num_lon = layout.grid.shape[2:]
        size = layout.spec.token_size
        return (num_lat * size.lat, num_lon * size.lon) if self.cells else (num_lat, num_lon)

    def _mask(self, layout: TokenLayout, hidden: np.ndarray) -> StreamMask:
        nothing = layout.nothing_hidden()
        if layout.spec.role != "predict":
            return nothing
        for axis, count in enumerate(self._counts(layout)):
            hidden = hidden.repeat(count // hidden.shape[axis], axis)
        if self.cells:
            points = points_of(nothing.hidden, layout.spec) | torch.from_numpy(hidden)
            return mask_of_points(points, layout.spec)
        nothing.corruption[:, :, torch.from_numpy(hidden)] = int(_KINDS[self.corruption])
        return nothing


def _on_sphere(
    size: np.ndarray, start: np.ndarray, layouts: Sequence[TokenLayout]
) -> tuple[np.ndarray, np.ndarray]:
    """Size and start of a box, as shares of latitude and longitude, whose width grows towards
    the poles. On a closed circle it may go on beyond the last longitude."""
    lat = layouts[0].point_lat()
    south, north = float(lat[0]), float(lat[-1])
    first = start[0] * (1 - size[0])
    centre = south + (first + size[0] / 2) * (north - south)
    width = min(1.0, size[1] / max(math.cos(math.radians(centre)), 1e-6))
    closed = all(layout.grid.periodic for layout in layouts)
    return np.array([size[0], width]), np.array([first, start[1] * (1.0 if closed else 1 - width)])


def _places(boxes: list, counts: Sequence[int]) -> Iterator[tuple[np.ndarray, ...]]:
    """The rows and columns of boxes of given sizes and starts (shares of the axes); beyond the
    end of an axis they start again at its beginning."""
    for size, start in boxes:
        yield tuple(
            np.arange(int(first * count), max(int(first * count) + 1, round((first + s) * count)))
            % count
            for first, s, count in zip(start, size, counts, strict=True)
        )


@dataclass(frozen=True)
class TimeBlockMasking:
    """Hide a random run of consecutive time steps whole, in all streams.

    Its draws contain the masks of prediction (the run at the end), hindcast (at the start) and
    temporal interpolation (in the middle). `hidden_steps`: range of the number of token steps of
    the stream with the longest tokens; at least one step stays visible.
    """

    hidden_steps: tuple[int, int] = (1, 2)
    causal: bool = False

    def __post_init__(self) -> None:
        low, high = self.hidden_steps
        if not 1 <= low <= high:
            raise ValueError(
                f"masking.hidden_steps={as_written([low, high])} must be 1 <= low <= high"
            )

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        coarsest = max(layouts, key=lambda layout: float(layout.grid.time_extent))
        num_steps = coarsest.grid.shape[1]
        low, high = (min(bound, num_steps - 1) for bound in self.hidden_steps)
        count = int(rng.integers(low, high + 1))
        last_start = num_steps - count
        start = last_start if self.causal else int(rng.integers(0, last_start + 1))
        # from the window's start, where the tokens of all streams begin, if not all their steps
        hours, extent = float(window_times(layouts)[0]), float(coarsest.grid.time_extent)
        first, end = hours + start * extent, hours + (start + count) * extent
        return hide_times(layouts, first, end - step_hours_of(layouts))


def _kind(sampler: MaskingSampler) -> str:
    name = snake_case(type(sampler).__name__).removesuffix("_masking")
    return f"causal_{name}" if isinstance(sampler, TimeBlockMasking) and sampler.causal else name


@dataclass(frozen=True)
class SplitBrain:
    """Hide one of two halves of the streams, drawn for each sample; the network predicts it from
    the other half (split-brain autoencoders, Zhang et al. 2017). Over all samples it learns both
    ways.

    first: names of the streams of the first half; none: the first half of those that are predicted,
        in their order. All other predicted streams are the second half.

    Raises:
        ValueError: a half without streams, when a mask is drawn.
    """

    first: Sequence[str] = ()

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        predicted = [layout.spec.name for layout in layouts if layout.spec.role == "predict"]
        first = set(self.first or predicted[: len(predicted) // 2])
        if not first < set(predicted):
            raise ValueError(
                f"masking.first={as_written(self.first)} must name some, but not all, of the "
                f"predicted streams {listed(predicted)}; split_brain needs at least two of them"
            )
        hides_first = bool(rng.integers(2))
        masks = []
        for layout in layouts:
            mask = layout.nothing_hidden()
            name = layout.spec.name
            if name in predicted and (name in first) == hides_first:
                mask.corruption.fill_(int(Corruption.MASK))
            masks.append(mask)
        return tuple(masks)


@dataclass(frozen=True)
class Autoregression:
    """Predict every time step but the first `context_steps` from the steps before it, all in one
    pass (as GPT, Radford et al. 2019). A network with `model.causal` gets the true values of
    every step, and uses them for later steps alone."""

    context_steps: Positive = 1

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        masks = []
        for layout in layouts:
            mask, num_steps = layout.nothing_hidden(), layout.grid.shape[1]
            if layout.spec.role == "predict":
                if self.context_steps >= num_steps:
                    raise ValueError(
                        f"masking.context_steps={self.context_steps} leaves none of the "
                        f"{num_steps} token steps of stream {layout.spec.name} to predict; give "
                        "fewer, or a longer data.window.time"
                    )
                mask.corruption[:, self.context_steps :] = int(Corruption.NEXT)
            masks.append(mask)
        return tuple(masks)


@dataclass(frozen=True)
class Mixture:
    """Draws one of several samplers for each sample, by probability.

    names: of the samplers, under which their losses are logged; by default those of their classes.

    Raises:
        ValueError: not one probability and one name for each sampler.
    """

    samplers: Sequence[MaskingSampler]
    probabilities: Sequence[float]
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.names and (
            len(self.names) != len(self.samplers) or len(set(self.names)) < len(self.names)
        ):
            raise ValueError(
                f"masking.names={as_written(self.names)} for {len(self.samplers)} samplers; give "
                "each a name of its own"
            )
        if len(self.samplers) != len(self.probabilities) or not self.samplers:
            raise ValueError(
                f"masking.probabilities has {len(self.probabilities)} values for "
                f"{len(self.samplers)} samplers; give one each"
            )
        if abs(sum(self.probabilities) - 1.0) > 1e-6 or min(self.probabilities) < 0:
            raise ValueError(
                f"masking.probabilities={as_written(self.probabilities)} must be positive and sum "
                "to 1"
            )

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        choice = int(rng.choice(len(self.samplers), p=list(self.probabilities)))
        sampler = self.samplers[choice]
        masks = sampler(layouts, rng)
        check_masks(sampler, masks, layouts)
        return tuple(replace(mask, kind=choice) for mask in masks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """A name for each sampler; where several are of one class, the name ends with a number."""
        if self.names:
            return tuple(self.names)
        classes = [_kind(sampler) for sampler in self.samplers]
        return tuple(
            f"{name}_{classes[: number + 1].count(name)}" if classes.count(name) > 1 else name
            for number, name in enumerate(classes)
        )
