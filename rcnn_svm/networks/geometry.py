"""Where the cells of a network's maps lie in the image: its layers run on coordinates instead of pixels.

Every value in a `_Place` is the coordinate, in pixels of the image, that the centre of the value's receptive
field has along one axis. A convolution then gives the middle of its window, an addition what its terms agree
on, a view a view. What comes from no place, or from everywhere (weights, attention, a mean over the map), is
NaN and leaves the place of what it is added to or multiplied with alone. So branches, patch embeddings,
padding on one side and gates need no rules of their own, and no weight is read.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["LayerInfo", "Located", "geometry_of", "locate"]

_EXACT = 1e-6
"""Pixels by which coordinates that are equal may differ for rounding."""
_TOLERANCE = 0.05
"""Cells that a centre may be uncertain by, to either side."""


@dataclass(frozen=True)
class LayerInfo:
    """Geometry of one layer.

    Attributes:
        channels: of its output.
        is_map: its output has rows and columns, on crops at least.
        stride: input pixels from one cell to the next.
        origin: (x, y) of the centre of the first cell's receptive field, in half-open pixels.
        problem: why regions cannot be pooled from its map; empty where they can.
        n_prefix: a map that is a row of tokens begins with so many that belong to no cell, such as the class
            token; None for maps of rows and columns.
    """

    channels: int
    is_map: bool
    stride: int
    origin: tuple[float, float]
    problem: str = ""
    n_prefix: int | None = None

    def cells(self, regions: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, 4) regions, given in pixels of the network's input, in cells of this layer's map.

        A cell stands for the centre of its receptive field, which is half a cell up and left of where a
        plain division by the stride would put it for networks that pad their strided convolutions.
        """
        cells = (regions - np.array(self.origin * 2)) / self.stride + 0.5
        return np.asarray(cells, np.float32)


class _UnknownError(Exception):
    """An operation that coordinates cannot be sent through."""


class _Place(torch.Tensor):
    """Coordinates: (2, ...) float64, along x in the first row of the batch and along y in the second.

    Where paths with different centres meet, `first` keeps the smaller coordinate, or the larger.
    """

    value: Tensor
    first: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor, first: bool) -> _Place:
        place: _Place = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=torch.float32, device=torch.device("meta")
        )
        place.value, place.first = value, first
        return place

    def __init__(self, value: Tensor, first: bool) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        places = _places(args)
        name = func.overloadpacket.__name__.rstrip("_") or func.overloadpacket.__name__
        first = places[0].first if places else True
        rule = _RULES.get(name)
        if rule is None:
            raise _UnknownError(f"it computes {name}, of which no centre is known")
        result = rule(func, first, *args, **(kwargs or {}))
        return tree_map(lambda v: cls(v, first) if isinstance(v, Tensor) and not v.is_meta else v, result)


def _places(args: Any) -> list[_Place]:
    found: list[_Place] = []
    for one in args:
        if isinstance(one, _Place):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += _places(one)
    return found


def _value(x: Any) -> Tensor:
    """Coordinates of a tensor; NaN for one that does not come from the image."""
    return x.value if isinstance(x, _Place) else _nowhere(x.shape)


def _nowhere(shape: Sequence[int]) -> Tensor:
    """NaN of a shape, as one number."""
    return torch.full((1,) * len(shape), torch.nan, dtype=torch.float64).expand(*shape)


def _narrow(x: Tensor, dim: int) -> Tensor:
    """Return an axis along which all is the same, which `expand` made, with one entry."""
    return x.narrow(dim, 0, 1) if x.stride(dim) == 0 and x.shape[dim] else x


def _smallest(x: Tensor) -> Tensor:
    for dim in range(x.ndim):
        x = _narrow(x, dim)
    return x


def _merged(x: Tensor, dim: int, first: bool) -> Tensor:
    """Return the first or last coordinate along an axis, NaN left out, with the axis kept."""
    x = _narrow(x, dim)
    if x.shape[dim] == 1:
        return x
    worst = torch.inf if first else -torch.inf
    held = x.nan_to_num(nan=worst)
    best = held.amin(dim, keepdim=True) if first else held.amax(dim, keepdim=True)
    return torch.where(best == worst, torch.nan, best)


def _mixed(x: Tensor, dim: int) -> Tensor:
    """Return the mean along an axis of channels that are mixed, NaN left out, with the axis kept."""
    x = _narrow(x, dim)
    return x if x.shape[dim] == 1 else x.nanmean(dim, keepdim=True)


def _pointwise(func: Any, first: bool, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _value(x)


def _normed(func: Any, first: bool, x: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.full((1,), torch.nan, dtype=torch.float64)
    return _value(x), empty, empty


def _both(func: Any, first: bool, x: Any, y: Any, *args: Any, **kwargs: Any) -> Tensor:
    one, other = (_value(v) if isinstance(v, Tensor) else torch.tensor(torch.nan).double() for v in (x, y))
    shape: tuple[int, ...] = torch.broadcast_shapes(one.shape, other.shape)  # type: ignore[no-untyped-call]
    one, other = (_smallest(v) for v in (one, other))
    return (torch.fmin(one, other) if first else torch.fmax(one, other)).expand(shape)


def _chosen(func: Any, first: bool, mask: Any, x: Any, y: Any) -> Tensor:
    return _both(func, first, x, y)


def _sum_of_products(func: Any, first: bool, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _both(func, first, x, _both(func, first, *args))


def _viewed(func: Any, first: bool, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Views do with coordinates what they do with pixels."""
    value = _value(x)
    if func.overloadpacket.__name__ in ("view", "_unsafe_view"):
        return value.reshape(*args)
    if func.overloadpacket.__name__ == "_reshape_alias":
        return value.reshape(args[0])
    kwargs.pop("memory_format", None)
    return func(value, *args, **kwargs)


def _joined(func: Any, first: bool, parts: Sequence[Any], dim: int = 0) -> Tensor:
    return func([_value(part) for part in parts], dim)  # type: ignore[no-any-return]


def _indexed(func: Any, first: bool, x: Any, indices: Any, *args: Any) -> Tensor:
    plain = [torch.as_tensor(i) if isinstance(i, Tensor) else i for i in indices]
    if any(isinstance(i, _Place) or (isinstance(i, Tensor) and i.is_meta) for i in plain):
        raise _UnknownError("it picks values by computed indices")
    return func(_value(x), plain, *args)  # type: ignore[no-any-return]


def _everywhere(func: Any, first: bool, *args: Any, **kwargs: Any) -> Any:
    """What mixes values from all over the image has the shape that it has, and no place."""
    plain = [torch.empty(a.shape, device="meta") if isinstance(a, Tensor) else a for a in args]
    return tree_map(
        lambda v: _nowhere(v.shape) if isinstance(v, Tensor) else v,
        func(*plain, **kwargs),
    )


def _product(func: Any, first: bool, x: Any, y: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Of a matrix of weights: what its inputs agree on. Of two that come from the image: from everywhere."""
    if isinstance(x, _Place) and isinstance(y, _Place):
        return _everywhere(func, first, x, y)  # type: ignore[no-any-return]
    if isinstance(x, _Place):
        return _mixed(x.value, -1).expand(*x.shape[:-1], y.shape[-1])
    return _mixed(_value(y), -2).expand(*y.shape[:-2], x.shape[-2], y.shape[-1])


def _affine(func: Any, first: bool, bias: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _product(torch.ops.aten.bmm.default if y.ndim == 3 else torch.ops.aten.mm.default, first, x, y)


def _reduced(func: Any, first: bool, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """A sum or mean of values of one place keeps it; of several, it comes from everywhere."""
    value = _value(x)
    dims = range(value.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = sorted({d % value.ndim for d in dims}, reverse=True)
    for d in dims:
        low, high = _merged(value, d, True), _merged(value, d, False)
        value = torch.where(high - low > _EXACT, torch.nan, low)
    for d in dims if not keepdim else ():
        value = value.squeeze(d)
    return value


def _extreme(func: Any, first: bool, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    value = _reduced(func, first, x, dim, keepdim)
    return value if dim is None else (value, torch.zeros(value.shape, dtype=torch.long))


def _deviated(func: Any, first: bool, x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    value = _reduced(func, first, x, dim, kwargs.get("keepdim", False))
    return (value, value) if "var_mean" in func.overloadpacket.__name__ else value


def _grid(value: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return (B, 1) the first coordinate of a (B, 1, h, w) map and its steps by row and by column."""
    if value.isnan().all():
        return None
    start = value[:, :, 0, 0]
    zero = torch.zeros_like(start)
    down = value[:, :, 1, 0] - start if value.shape[2] > 1 else zero
    right = value[:, :, 0, 1] - start if value.shape[3] > 1 else zero
    expected = _spread_out(start, down, right, (value.shape[2], value.shape[3]))
    if not torch.allclose(value, expected, atol=_EXACT, rtol=0):
        raise _UnknownError("its cells do not lie at even distances")
    return start, down, right


def _spread_out(start: Tensor, down: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    return start[..., None, None] + down[..., None, None] * rows[:, None] + right[..., None, None] * columns


def _windows(
    value: Tensor,
    n_out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """Return (B, n_out, h, w): the middle of the windows of a convolution or pooling."""
    grid = _grid(value)
    if grid is None:
        return _nowhere((len(value), n_out, *size))
    start, *steps = grid
    for step, k, p, d in zip(steps, kernel, padding, dilation, strict=True):
        start = start + step * (d * (k - 1) / 2 - p)
    down, right = (step * s for step, s in zip(steps, stride, strict=True))
    return _spread_out(start, down, right, (size[0], size[1])).expand(-1, n_out, -1, -1)


def _pair(value: Sequence[int] | int) -> list[int]:
    both = [value] if isinstance(value, int) else list(value)
    return both * 2 if len(both) == 1 else both


def _convolved(
    func: Any,
    first: bool,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *args: Any,
) -> Tensor:
    if transposed or weight.ndim != 4:
        raise _UnknownError("it has a convolution that is not over rows and columns")
    stride, padding, dilation = map(_pair, (stride, padding, dilation))
    value = _mixed(_value(x), 1)
    kernel = weight.shape[2:]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(value.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return _windows(value, len(weight), kernel, stride, padding, dilation, size)


def _pooled(
    func: Any, first: bool, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, *rest: Any
) -> Any:
    shapes = func(torch.empty(x.shape, device="meta"), kernel, stride, padding, *rest)
    both = isinstance(shapes, tuple)  # of maximum pooling: with indices
    size = (shapes[0] if both else shapes).shape[2:]
    is_max = "max" in func.overloadpacket.__name__
    dilation = _pair(rest[0]) if is_max and rest else [1, 1]
    value = _merged(_value(x), 1, first)
    kernel = _pair(kernel)
    out = _windows(value, x.shape[1], kernel, _pair(stride or kernel), _pair(padding), dilation, size)
    return (out, out) if both else out


def _pooled_adaptively(func: Any, first: bool, x: Any, size: Any) -> Any:
    if tuple(size) == tuple(x.shape[2:]):
        return _value(x)
    return _everywhere(func, first, x, size)


def _padded(func: Any, first: bool, x: Any, pads: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """Go on with coordinates beyond the border, as windows that begin there are to find them."""
    whole, padded = _value(x), range(x.ndim - len(pads) // 2, x.ndim)
    value = whole
    for dim in range(x.ndim):
        value = value if dim in padded else _narrow(value, dim)
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        dim = value.ndim - 1 - i
        n = value.shape[dim]
        at = torch.arange(-before, n + after)
        inside = at.clamp(0, n - 1)
        step = value.narrow(dim, 1, 1) - value.narrow(dim, 0, 1) if n > 1 else value.narrow(dim, 0, 1) * 0
        shape = [1] * value.ndim
        shape[dim] = len(at)
        value = value.index_select(dim, inside) + step * (at - inside).view(shape)
    return value.expand(*whole.shape[: padded.start], *value.shape[padded.start :])


def _resized(func: Any, first: bool, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    result = func(torch.empty(x.shape, device="meta"), *args, **kwargs)
    size = result.shape[2:]
    grid = _grid(_merged(_value(x), 1, first))
    if grid is None or tuple(size) == tuple(x.shape[2:]):
        return _nowhere(result.shape) if grid is None else _value(x)
    start, *steps = grid
    ratios = [old / new for old, new in zip(x.shape[2:], size, strict=True)]
    for step, ratio in zip(steps, ratios, strict=True):
        start = start + step * (ratio - 1) / 2
    down, right = (step * ratio for step, ratio in zip(steps, ratios, strict=True))
    return _spread_out(start, down, right, (size[0], size[1])).expand(-1, x.shape[1], -1, -1)


def _new(func: Any, first: bool, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Tensors that are made like another, of its type and device, do not come from the image."""
    made: Tensor = func(torch.empty(x.shape, device="meta"), *args, **kwargs)
    return made


def _rules(names: str, rule: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[..., Any]] = {
    **_rules(
        "relu gelu silu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu mish softplus exp log "
        "sqrt rsqrt pow neg abs reciprocal clamp clamp_min clamp_max celu selu _prelu_kernel rrelu erf "
        "square dropout detach alias clone _to_copy lift_fresh log_sigmoid_forward threshold sin cos sign",
        _pointwise,
    ),
    **_rules(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_layer_norm "
        "native_group_norm cudnn_batch_norm _fused_rms_norm",
        _normed,
    ),
    **_rules("add sub mul div maximum minimum rsub", _both),
    "where": _chosen,
    **_rules("addcmul lerp", _sum_of_products),
    **_rules(
        "view _unsafe_view _reshape_alias reshape permute transpose t unsqueeze squeeze expand slice select "
        "split split_with_sizes unbind roll flip repeat narrow pixel_shuffle pixel_unshuffle "
        "channel_shuffle native_channel_shuffle unfold as_strided unsafe_split diagonal",
        _viewed,
    ),
    **_rules("cat stack", _joined),
    **_rules("index index_select", _indexed),
    **_rules(
        "_softmax _safe_softmax _log_softmax _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable cumsum "
        "linalg_vector_norm norm topk",
        _everywhere,
    ),
    **_rules("mm bmm matmul dot mv", _product),
    **_rules("addmm baddbmm", _affine),
    **_rules("mean sum amax amin", _reduced),
    **_rules("max min", _extreme),
    **_rules("var std var_mean", _deviated),
    "convolution": _convolved,
    **_rules("avg_pool2d max_pool2d_with_indices", _pooled),
    **_rules("_adaptive_avg_pool2d adaptive_max_pool2d adaptive_avg_pool2d", _pooled_adaptively),
    **_rules("constant_pad_nd reflection_pad2d replication_pad2d", _padded),
    **_rules("upsample_bilinear2d upsample_nearest2d upsample_bicubic2d _upsample_bilinear2d_aa", _resized),
    **_rules(
        "ones_like zeros_like empty_like full_like rand_like new_zeros new_ones new_empty new_full", _new
    ),
}
"""What coordinates do in an operation of torch (ATen), by its name."""


def _coordinates(size: tuple[int, int], first: bool) -> _Place:
    """Return (2, 3, H, W): where the pixels of an image lie along x, and along y."""
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
    value = torch.stack([x.expand(*size), y[:, None].expand(*size)])
    return _Place(value[:, None].expand(2, 3, *size), first)


Axes = Literal["rows", "last", "tokens", "none"]
"""What a layer's output is: (B, C, h, w), (B, h, w, C), (B, N, C) with a token a cell, or without cells."""


@dataclass(frozen=True)
class Located:
    """What a layer's output is and where its cells lie.

    Attributes:
        shape: of the output for one image, without the batch.
        axes: see `Axes`.
        starts: (x, y) of the first cell, as low and as high as paths have it; None where it has no place.
        steps: from one cell to the next along x and y, in pixels.
        n_prefix: tokens before those of the cells.
        problem: why starts and steps are not known; empty where they are.
    """

    shape: tuple[int, ...]
    axes: Axes = "none"
    starts: tuple[tuple[float, float], tuple[float, float]] | None = None
    steps: tuple[float, float] = (1.0, 1.0)
    n_prefix: int = 0
    problem: str = ""


def locate(layers: Mapping[str, nn.Module], size: tuple[int, int]) -> OrderedDict[str, Located]:
    """Send the coordinates of an image of `size` (height, width) through layers, one after the other.

    Args:
        layers: by name; they may lie on the meta device, since no weight is read.
        size: of the image, large enough for two cells of the deepest map along each axis.
    """
    found: OrderedDict[str, Located] = OrderedDict()
    plain = torch.empty(2, 3, *size, device="meta")
    low: Any = _coordinates(size, True)
    high: Any = _coordinates(size, False)
    problem, before = "", Located(())
    with torch.no_grad():
        for name, layer in layers.items():
            try:
                plain = layer.forward(plain)
            except (RuntimeError, AssertionError, ValueError) as error:
                what = f"{size[1]} x {size[0]} pixels ({_first_line(error)})"
                problem = f"it does not take images of any size, such as {what}"
                break
            if not problem:
                try:
                    low, high = layer.forward(low), layer.forward(high)
                # It went through as a plain tensor: whatever fails here is a rule of ours.
                except (_UnknownError, RuntimeError, TypeError, ValueError, IndexError) as error:
                    problem = _first_line(error)
            shape = tuple(plain.shape[1:])
            if not problem:
                before = found[name] = _read(shape, low.value, high.value)
            elif len(shape) == len(before.shape):  # taken to be what it was
                before = found[name] = replace(before, shape=shape, starts=None, problem=problem)
            else:
                before = found[name] = Located(shape, "rows" if len(shape) == 3 else "none", problem=problem)
    for name in layers:
        found.setdefault(name, Located((), problem=problem))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _read(shape: tuple[int, ...], low: Tensor, high: Tensor) -> Located:
    """Read from the coordinates of a layer's output what its axes are and where its cells begin."""
    axes, n_prefix = _axes_of(low)
    if axes == "none":
        return Located(shape)
    try:
        grids = [
            _grid(_as_rows(value, axes, n_prefix, first)) for value, first in ((low, True), (high, False))
        ]
    except _UnknownError as error:
        return Located(shape, axes, n_prefix=n_prefix, problem=str(error))
    if grids[0] is None or grids[1] is None:
        return Located(shape, axes, n_prefix=n_prefix, problem="each cell sees the whole image")
    starts = [grid[0][:, 0].tolist() for grid in grids if grid is not None]
    _, down, right = grids[0]
    return Located(
        shape,
        axes,
        ((starts[0][0], starts[0][1]), (starts[1][0], starts[1][1])),
        (float(right[0, 0]), float(down[1, 0])),
        n_prefix,
    )


def _varies(value: Tensor, dim: int) -> bool:
    """Whether coordinates of a row of the batch change along an axis."""
    low, high = _merged(value, dim, True), _merged(value, dim, False)
    return bool(((high - low).nan_to_num(nan=0.0) > _EXACT).any())


def _axes_of(value: Tensor) -> tuple[Axes, int]:
    if value.ndim == 4:
        if _varies(value[:1], 3) and _varies(value[1:], 2):
            return "rows", 0
        if _varies(value[:1], 2) and _varies(value[1:], 1):
            return "last", 0
    if value.ndim == 3 and _varies(value[:1], 1):
        known = ~_merged(value, 2, True)[0, :, 0].isnan()
        return "tokens", int(known.int().argmax())
    return "none", 0


def _as_rows(value: Tensor, axes: Axes, n_prefix: int, first: bool) -> Tensor:
    """Return (2, 1, h, w) coordinates of the cells."""
    if axes == "rows":
        return _merged(value, 1, first)
    if axes == "last":
        return _merged(value, 3, first).permute(0, 3, 1, 2)
    cells = _merged(value, 2, first)[:, n_prefix:, 0]
    columns = int((cells[1] == cells[1, 0]).sum())  # as many cells lie in the first row
    if not columns or cells.shape[1] % columns:
        raise _UnknownError("its tokens are in no rows of cells")
    return cells.view(2, 1, -1, columns)


def geometry_of(found: Located, previous: LayerInfo) -> LayerInfo:
    """Return what pooling wants to know of a layer.

    Args:
        found: by `locate`.
        previous: of the layer before it, whose stride and origin one without cells takes over.
    """
    is_map, prefix = found.axes != "none", found.n_prefix if found.axes == "tokens" else None
    channels = {"rows": 0, "last": -1, "tokens": -1}.get(found.axes)
    n = math.prod(found.shape) if channels is None else found.shape[channels] if found.shape else 0
    old = previous.stride, previous.origin
    if not is_map:
        return LayerInfo(n, False, *old, found.problem, prefix)
    if found.problem or found.starts is None:
        return LayerInfo(n, True, *old, found.problem, prefix)
    across, down = found.steps
    (x, y), (last_x, last_y) = found.starts
    stride = round(across)
    problem = ""
    apart = max(last_x - x, last_y - y) / max(across, 1e-9)
    if max(abs(across - stride), abs(down - stride)) > _EXACT or stride < 1:
        problem = f"its cells lie {across:g} x {down:g} pixels apart"
    elif apart > 2 * _TOLERANCE:
        problem = f"the paths to a cell are centred {apart:.2f} cells apart"
    middle = (x + last_x) / 2, (y + last_y) / 2
    return LayerInfo(n, True, max(stride, 1), middle, problem, prefix)
