"""Contests of streaming second moments: layouts, dtypes, channels, rows, and whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcov.bench import peers
from fastcov.bench.contest import OURS, Contest, Setting, Work, check, relative_error
from fastcov.bench.floors import GramLoad, gram_bytes, gram_floor, resnet50_maps
from fastcov.bench.machine import slots
from fastcov.bench.timing import Call, interleave
from fastcov.ops import accumulate_
from fastcov.ops.reference import accumulate_reference_
from fastcov.stats.buffering import buffer_rows
from fastcov.stats.state import CovarianceState

ERROR_BAR = 1e-5
_PROMISED_CHANNELS = (64, 128, 256, 512, 1024, 2048)
_PROMISED_SHAPES = len(_PROMISED_CHANNELS)
_LAYOUTS = ("rows", "channels_last", "nchw", "tokens", "strided")


class Shape(NamedTuple):
    """One activation: its memory layout, dtype, channels and rows."""

    layout: str
    dtype: torch.dtype
    channels: int
    rows: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.layout} {dtype} C={self.channels} K={self.rows}"


def works(setting: Setting) -> list[Work]:
    """Covariance contests of a setting."""
    shapes = dict.fromkeys(_shapes(setting))
    single = [Work(str(shape), partial(_shape_contest, shape)) for shape in shapes]
    if setting.is_tiny:
        return [*single, _network("ResNet-50 convs, batch 1 at 32, float32", 1, 32, 32, setting)]
    if setting.device.type == "cuda":
        # Promised shapes come first, so that they are measured even if time runs out.
        return [
            *single[:_PROMISED_SHAPES],
            _network("ResNet-50 convs, batch 256 at 224, bfloat16", 256, 224, 224, setting),
            _network("ResNet-50 convs, batch 2 at 800x1344, bfloat16", 2, 800, 1344, setting),
            *single[_PROMISED_SHAPES:],
        ]
    return [*single, _network("ResNet-50 convs, batch 8 at 112, float32", 8, 112, 112, setting)]


def _shapes(setting: Setting) -> Iterator[Shape]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    if setting.is_tiny:
        yield from (Shape(layout, f32, 16, 392) for layout in ("channels_last", "nchw"))
        yield Shape("channels_last", bf16, 16, 392)
    elif setting.device.type == "cuda":
        many = 1 << 18
        yield from (Shape("channels_last", bf16, c, many) for c in _PROMISED_CHANNELS)
        yield from (Shape("channels_last", dtype, 256, many) for dtype in (f16, f32))
        yield from (Shape(layout, bf16, 256, many) for layout in ("nchw", "tokens", "strided"))
        yield from (Shape("channels_last", bf16, 2048, rows) for rows in (392, 12544))
        if setting.size == "full":
            yield from (
                Shape(layout, dtype, c, rows)
                for layout in _LAYOUTS
                for dtype in (f32, bf16, f16)
                for c in (64, 256, 512, 1128)
                for rows in (6272, 100352)
            )
    else:
        yield from (
            Shape("channels_last", f32, c, rows)
            for c, rows in ((64, 6272), (256, 6272), (512, 1568), (1024, 1568), (2048, 392))
        )
        yield from (Shape(layout, f32, 256, 6272) for layout in ("nchw", "tokens", "strided"))
        yield Shape("channels_last", bf16, 256, 6272)
        if setting.size == "full":
            yield from (
                Shape(layout, dtype, c, rows)
                for layout in _LAYOUTS
                for dtype in (f32, bf16, f16)
                for c in (41, 64, 123, 256, 512, 1128)
                for rows in (196, 6272)
            )


def make_rows(shape: Shape, device: torch.device, seed: int) -> Tensor:
    """A random activation as a row view, in the shape's memory layout. [..., C]"""
    generator = torch.Generator(device).manual_seed(seed)
    channels, images = shape.channels, 8
    positions = shape.rows // images

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator).to(shape.dtype)

    if shape.layout == "rows":
        return draw(shape.rows, channels)
    if shape.layout == "tokens":
        return draw(images, positions, channels)
    if shape.layout == "strided":
        return draw(images, positions, 2 * channels)[..., :channels]
    side = max(d for d in range(1, int(positions**0.5) + 1) if positions % d == 0)
    if shape.layout == "channels_last":
        return draw(images, side, positions // side, channels)
    return draw(images, channels, side, positions // side).permute(0, 2, 3, 1)


def _shape_contest(shape: Shape, setting: Setting) -> Contest:
    device = setting.device
    load = GramLoad(shape.rows, shape.channels, shape.dtype)
    copies = slots(gram_bytes(load), setting.rates.cache_bytes)
    inputs = [[make_rows(shape, device, seed)] for seed in range(copies)]
    return _contest(str(shape), inputs, setting, rounds=setting.rounds(25))


def _network(name: str, batch: int, height: int, width: int, setting: Setting) -> Work:
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32

    def build(setting: Setting) -> Contest:
        shapes = [
            Shape("channels_last", dtype, c, b * h * w)
            for b, c, h, w in resnet50_maps(batch, height, width)
        ]
        # A network's activations are many times any cache: one set, read in turn, is never in it.
        generator = torch.Generator(setting.device).manual_seed(0)
        maps = [
            torch.randn(
                s.rows, s.channels, device=setting.device, generator=generator, dtype=s.dtype
            )
            for s in shapes
        ]
        return _contest(name, [maps], setting, rounds=setting.rounds(12))

    return Work(name, build)


def _contest(
    work: str, inputs: Sequence[Sequence[Tensor]], setting: Setting, *, rounds: int
) -> Contest:
    # inputs: sets to rotate through. Each is a list of activations, each with a state of its own.
    device = setting.device
    truths = [_truth(rows) for rows in inputs[0]]
    errors: dict[str, float] = {}

    def start(name: str, make: peers.MomentMaker) -> Call:
        moments = [[make(rows.shape[-1]) for rows in one] for one in inputs]
        for moment, rows in zip(moments[0], inputs[0], strict=True):
            moment.update(rows)
        errors[name] = max(
            relative_error(moment.gram().tril(), truth.tril())
            for moment, truth in zip(moments[0], truths, strict=True)
        )
        pairs = [list(zip(*both, strict=True)) for both in zip(moments, inputs, strict=True)]

        def run(index: int) -> None:
            for moment, rows in pairs[index % len(pairs)]:
                moment.update(rows)

        return run

    def join(name: str, peer: Callable[[torch.device], peers.MomentMaker]) -> Call:
        return start(name, peer(device))

    contenders = {OURS: start(OURS, partial(_our_moment, device))}
    check(work, errors[OURS], ERROR_BAR)
    joining = dict(peers.MOMENT_PEERS)
    if setting.size == "full":
        joining |= peers.COMPILED_MOMENT_PEERS
    for name, peer in joining.items():
        call = peers.find(setting, name, partial(join, name, peer))
        if call is not None:
            contenders[name] = call
    loads = [GramLoad(rows.shape[:-1].numel(), rows.shape[-1], rows.dtype) for rows in inputs[0]]
    return Contest(
        contenders,
        reference=OURS,
        rounds=rounds,
        errors=errors,
        floor=gram_floor(loads, setting.rates),
        budget_s=6.0,
        clock="device",
    )


def update_seconds(widths: Sequence[int], dtype: torch.dtype, setting: Setting) -> dict[int, float]:
    """Seconds to add one full buffer of rows to a state that is not in cache, by channels C."""
    contenders: dict[str, Call] = {}
    for channels in widths:
        rows = buffer_rows(channels, is_host=setting.device.type == "cpu")
        load = GramLoad(rows, channels, dtype)
        pairs = [
            (
                CovarianceState(channels, setting.device),
                make_rows(Shape("rows", dtype, channels, load.rows), setting.device, seed),
            )
            for seed in range(slots(gram_bytes(load), setting.rates.cache_bytes, most=16))
        ]
        contenders[str(channels)] = partial(_update_in_turn, pairs)
    samples = interleave(contenders, setting.device, rounds=setting.rounds(9), clock="device")
    return {int(channels): float(np.median(times)) for channels, times in samples.items()}


def _update_in_turn(pairs: Sequence[tuple[CovarianceState, Tensor]], index: int) -> None:
    state, rows = pairs[index % len(pairs)]
    accumulate_(state, rows)


def _our_moment(device: torch.device, channels: int) -> peers.Moment:
    state = CovarianceState(channels, device)
    return peers.Moment(partial(accumulate_, state), lambda: state.covariance() * state.weight)


def _truth(rows: Tensor) -> Tensor:
    state = CovarianceState(rows.shape[-1], rows.device)
    accumulate_reference_(
        state.moment, state.sum, state.shift, state.weight, state.count, rows, None, 1.0, 1.0
    )
    return state.covariance() * state.weight
