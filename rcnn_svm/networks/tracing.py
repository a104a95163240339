"""Any network as a chain of named layers: its graph, cut wherever a single tensor goes on.

The graph is that of torch.fx. A layer ends where nothing but one output is needed from there on, and has the
names of all modules that end there; what follows it directly among its siblings, a normalisation or an
activation, belongs to it.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torchvision
from torch import fx, nn

from rcnn_svm.errors import ConfigError
from rcnn_svm.networks.geometry import LayerInfo, Located, geometry_of, locate

__all__ = ["Plan", "TracedLayers", "join_notes", "on_meta", "plan_of", "stages_of", "trace"]

_ABOUT = "rcnn_svm"
"""Key of what is noted of a node."""
_ELEMENTWISE_MODULES = (
    "torch.nn.modules.activation",
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.normalization",
    "timm.layers.activations",
    "timm.layers.drop",
    "timm.layers.norm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
_ELEMENTWISE = {
    *(
        "batch_norm",
        "dropout",
        "elu",
        "gelu",
        "group_norm",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "layer_norm",
    ),
    *("leaky_relu", "mish", "relu", "relu6", "rms_norm", "sigmoid", "silu", "softplus", "tanh"),
}
_MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which modules of timm become a single convolution for inference: inside they have no layers."""
_SPATIAL = {
    *("avg_pool2d", "bmm", "conv2d", "einsum", "matmul", "max_pool2d", "scaled_dot_product_attention"),
    "softmax",
}
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass
class _About:
    """What is noted of a node of a graph.

    Attributes:
        index: its place in the graph as it was traced.
        starts: of the modules that end there, by path, the indices where they begin.
        scope: the module that it lies in.
        weighted: it is a fully connected layer or a convolution.
    """

    index: int
    starts: dict[str, int]
    scope: str
    weighted: bool

    def joined(self, other: _About) -> _About:
        """Return what is to be noted of a node that does what two did, the second right after the first."""
        starts = self.starts | other.starts
        return _About(other.index, starts, self.scope, self.weighted or other.weighted)


class _Tracer(fx.Tracer):
    """Traces down to modules that compute one thing, and notes where every module ends."""

    def __init__(self, *, merged: bool) -> None:
        self._merging = () if merged else _MERGING
        timm = sys.modules.get("timm")  # without it no module is of it
        functions: Sequence[Callable[..., Any]] = timm.models.get_notrace_functions() if timm else ()
        modules: Sequence[type[nn.Module]] = timm.models.get_notrace_modules() if timm else ()
        super().__init__((math, torchvision.ops), tuple(functions))  # type: ignore[arg-type]
        self._whole = tuple(modules)
        self.ends: dict[fx.Node, list[str]] = {}
        self.starts: dict[str, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one step of the graph."""
        kind = f"{type(m).__module__}.{type(m).__qualname__}"
        return (
            isinstance(m, self._whole)
            or kind.startswith(("timm.layers.norm", "torchvision.ops.misc.FrozenBatchNorm2d", "rcnn_svm."))
            or kind.startswith("torchvision.ops.stochastic_depth")
            or any(hasattr(m, method) for method in self._merging)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module, and note at which node it ends; one that cannot be followed stays one step."""
        path = self.path_of_module(m)
        before, outside = list(self.graph.nodes), self.module_stack.copy()
        self.starts[path] = len(before)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:  # a forward pass on placeholders raises anything
            self.module_stack = outside
            for node in reversed(list(self.graph.nodes)[len(before) :]):
                self.graph.erase_node(node)
            result = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.ends.setdefault(result.node, []).append(path)
        return result


def _settings_of(net: nn.Module) -> dict[str, Any]:
    """Return the defaults of what a module's call takes beside the images."""
    _, *others = inspect.signature(net.forward).parameters.values()
    return {p.name: p.default for p in others if p.default is not p.empty}


def _erase_settings(graph: fx.Graph) -> None:
    """Leave out all inputs but the images; what reads them asserts only that they have their values."""
    _, *settings = (node for node in graph.nodes if node.op == "placeholder")
    readers = set(settings)
    for node in graph.nodes:
        if not readers.isdisjoint(node.all_input_nodes):
            readers.add(node)
    for node in reversed(list(graph.nodes)):
        if node in readers:
            graph.erase_node(node)


def trace(net: nn.Module, *, merged: bool = False) -> fx.GraphModule:
    """Return the graph of a module in evaluation mode; it shares all parameters with the module.

    Args:
        net: the module; a graph that this function returned is returned as it is.
        merged: blocks that can become one convolution have done so, and are followed into.

    Raises:
        ConfigError: the module's flow depends on values, or it has not one input and one output.
    """
    if isinstance(net, fx.GraphModule):
        return net
    training = net.training
    tracer = _Tracer(merged=merged)
    try:
        graph = tracer.trace(net.eval(), _settings_of(net))
    except Exception as error:  # a forward pass raises anything
        raise ConfigError(
            f"{type(net).__name__}: its layers cannot be told apart, since torch.fx cannot follow it "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            f"Describe it with rcnn_svm.Architecture, and a `split` of yours."
        ) from error
    finally:
        net.train(training)
    for i, node in enumerate(graph.nodes):
        paths = [path for path in tracer.ends.get(node, []) if path]
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        scope = str(stack[-1][0]) if stack else ""
        is_module = node.op == "call_module"
        node.meta[_ABOUT] = _About(
            i,
            {path: tracer.starts[path] for path in paths},
            scope.rpartition(".")[0] if is_module else scope,
            is_module
            and any(
                isinstance(m, nn.Linear | nn.Conv2d) for m in net.get_submodule(str(node.target)).modules()
            ),
        )
    _erase_settings(graph)
    traced = fx.GraphModule(net, graph, type(net).__name__)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    traced.train(training)
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise ConfigError(f"{type(net).__name__}: must make one tensor of one tensor, its images.")
    return traced


@dataclass
class _Cut:
    """A place where one tensor alone goes on: the end of a layer.

    Attributes:
        node: whose output that is.
        starts: of the modules that end there, innermost first, the indices of the nodes where they begin.
        scopes: the modules in which what may still belong to the layer lies.
    """

    node: fx.Node
    starts: dict[str, int]
    scopes: set[str]

    @property
    def index(self) -> int:
        """Its place in the graph as it was traced."""
        return _about(self.node).index


def _about(node: fx.Node) -> _About:
    """Return what is noted of a node."""
    noted: _About = node.meta[_ABOUT]
    return noted


def join_notes(node: fx.Node, after: fx.Node) -> None:
    """Note of a node that it does from now on what another, right after it, did."""
    node.meta[_ABOUT] = _about(node).joined(_about(after))


def _cuts(traced: fx.GraphModule) -> list[_Cut]:
    nodes = list(traced.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    image = _image(traced)
    depends = {image}
    for node in nodes:
        if any(other in depends for other in node.all_input_nodes):
            depends.add(node)
    last = {n: max((place[user] for user in n.users), default=place[n]) for n in depends}
    cuts: list[_Cut] = []
    open_until = last[image]  # of what was made before the node at hand
    for node in nodes:
        if node not in depends or node is image or node.op == "output":
            continue
        if open_until <= place[node]:
            noted = _about(node)
            starts, scopes = noted.starts, {noted.scope, *(path.rpartition(".")[0] for path in noted.starts)}
            if cuts and len(cuts[-1].node.users) == 1:
                before = cuts[-1]
                if noted.scope in before.scopes and _is_elementwise(traced, node):
                    cuts.pop()
                    starts, scopes = before.starts | starts, before.scopes | scopes
            cuts.append(_Cut(node, starts, scopes))
        open_until = max(open_until, last[node])
    return cuts


def _image(traced: fx.GraphModule) -> fx.Node:
    image: fx.Node = next(node for node in traced.graph.nodes if node.op == "placeholder")
    return image


def _layers(traced: fx.GraphModule, *, with_logits: bool) -> list[_Cut]:
    """Return the ends of all layers; where there are logits, all that follows their weights is one layer."""
    *cuts, end = _cuts(traced)
    if with_logits:
        weights = max(_about(node).index for node in traced.graph.nodes if _about(node).weighted)
        before = [cut for cut in cuts if cut.index < weights]
        named = [cut for cut in before[:-1] if cut.starts]
        return [*named, *before[-1:], end]
    return [*(cut for cut in cuts if cut.starts), end]


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_elementwise(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return f"{type(module).__module__}.{type(module).__qualname__}".startswith(_ELEMENTWISE_MODULES)
    return _name_of(node).rstrip("_") in _ELEMENTWISE


def _is_spatial(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operation lets cells see each other, but for means over all of them."""
    if node.op != "call_module":
        return _name_of(node) in _SPATIAL
    module = traced.get_submodule(str(node.target))
    if isinstance(module, nn.Conv2d):
        return max(module.kernel_size) > 1
    return isinstance(module, _POOLING) or not (
        isinstance(module, nn.Linear | nn.AdaptiveAvgPool2d | nn.Flatten) or _is_elementwise(traced, node)
    )


def _cut_out(
    traced: fx.GraphModule, after: _Cut | None, until: _Cut, *, from_last: bool = False, to_last: bool = False
) -> nn.Module:
    """Return the part of a graph from one cut to another as a module that shares the graph's parameters.

    Args:
        traced: the graph.
        after: where it begins; None for the image.
        until: where it ends.
        from_last: what it reads has channels last in the graph, and comes as (B, C, h, w).
        to_last: likewise what it makes.
    """
    start = _image(traced) if after is None else after.node
    needed: set[fx.Node] = set()
    wanted = [until.node]
    while wanted:
        node = wanted.pop()
        if node is not start and node not in needed:
            needed.add(node)
            wanted += node.all_input_nodes
    graph = fx.Graph()
    x = graph.placeholder("x")
    copied = {start: graph.call_method("permute", (x, 0, 2, 3, 1)) if from_last else x}
    for node in traced.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    result = copied[until.node]
    graph.output(graph.call_method("permute", (result, 0, 3, 1, 2)) if to_last else result)
    return fx.GraphModule(traced, graph, "Layer")


@dataclass(frozen=True)
class Plan:
    """The layers of a network, whatever its weights.

    Attributes:
        maps: names of its map layers, in order.
        regions: names of its region layers, in order.
        aliases: other names of its layers: of modules that end with them, and `s16` for the last map of
            stride 16 that more than single cells went into.
        paths: modules that end with each layer, by its name.
        last: map layers whose output has channels last in the network itself.
        located: where the cells of each layer lie on a crop, maps and regions in order.
        with_logits: whether there is a layer of logits.
    """

    maps: tuple[str, ...]
    regions: tuple[str, ...]
    aliases: Mapping[str, str]
    paths: Mapping[str, tuple[str, ...]]
    last: frozenset[str]
    located: tuple[Located, ...]
    with_logits: bool


def plan_of(net: nn.Module, crop_size: int, *, with_logits: bool = True) -> Plan:
    """Find the layers of a network, which may lie on the meta device.

    Args:
        net: in evaluation mode.
        crop_size: side of the images that it was trained on, in pixels.
        with_logits: whether its output is one number a class.

    Raises:
        ConfigError: it cannot be traced, or has no map.
    """
    traced = trace(net)
    cuts = _layers(traced, with_logits=with_logits)
    raw = OrderedDict(
        (str(i), _cut_out(traced, before, cut))
        for i, (before, cut) in enumerate(zip([None, *cuts], cuts, strict=False))
    )
    located = list(locate(raw, (crop_size, crop_size)).values())
    n_maps = next((i for i, one in enumerate(located) if not _has_cells(one)), len(cuts))
    if n_maps == 0:
        raise ConfigError(f"{type(net).__name__}: has no map, that is, no layer with rows and columns.")
    if n_maps == len(cuts):
        raise ConfigError(f"{type(net).__name__}: must end in one vector an image, got a map.")
    strides = [round(one.steps[0]) if one.starts else 0 for one in located]
    names = [_outermost(cuts, strides, i) for i in range(len(cuts))]
    names[-1] = "logits" if with_logits else "penultimate"
    if with_logits and n_maps < len(cuts) - 1:
        names[-2] = "penultimate"
    paths = {name: tuple(cut.starts) for name, cut in zip(names, cuts, strict=True)}
    aliases = {path: name for name, own in paths.items() for path in own if path not in paths}
    for stride in sorted({stride for stride in strides[:n_maps] if stride > 1}):
        own = [i for i in range(n_maps) if strides[i] == stride]
        ends = [i for i in own if not _is_inside(cuts, strides, i)]
        chosen = _deepest(traced, cuts, strides, max(ends or own))
        aliases[f"s{stride}"] = names[chosen]
    return Plan(
        tuple(names[:n_maps]),
        tuple(names[n_maps:]),
        aliases,
        paths,
        frozenset(name for name, one in zip(names[:n_maps], located, strict=False) if one.axes == "last"),
        tuple(located),
        with_logits,
    )


def _has_cells(found: Located) -> bool:
    if found.axes == "rows":
        return min(found.shape[1:]) > 1
    return found.axes == "tokens" or (found.axes == "last" and min(found.shape[:2]) > 1)


def _entry(cuts: Sequence[_Cut], start: int) -> int:
    """Return the last layer before the node where a module begins; -1 for the image."""
    return max((i for i, cut in enumerate(cuts) if cut.index < start), default=-1)


def _within_stride(cuts: Sequence[_Cut], strides: Sequence[int], start: int, end: int) -> bool:
    """Whether a module that begins at a node and ends with a layer changes the stride at most once."""
    first = _entry(cuts, start)
    seen = [stride for stride in strides[max(first, 0) : end + 1] if stride]
    return len(set(seen)) <= 2 and (first >= 0 or len(set(seen)) <= 1)


def _is_inside(cuts: Sequence[_Cut], strides: Sequence[int], i: int) -> bool:
    """Whether a layer lies inside a module that goes on to another stride."""
    return any(
        start <= cuts[i].index and strides[end] != strides[i] and _within_stride(cuts, strides, start, end)
        for end in range(i + 1, len(cuts))
        for start in cuts[end].starts.values()
    )


def _outermost(cuts: Sequence[_Cut], strides: Sequence[int], i: int) -> str:
    """Return the name of a layer: of the largest module that ends there and changes the stride once."""
    starts = cuts[i].starts
    own = {path: start for path, start in starts.items() if _within_stride(cuts, strides, start, i)} or starts
    return min(reversed(own), key=own.__getitem__, default=f"layer_{i}")


def _deepest(traced: fx.GraphModule, cuts: Sequence[_Cut], strides: Sequence[int], i: int) -> int:
    """Go back from a layer over those that only mix channels to the end of what looks at neighbours."""
    nodes = list(traced.graph.nodes)
    stride, at = strides[i], i
    while at >= 0 and strides[at] == stride:
        start = min(
            (s for s in cuts[at].starts.values() if _within_stride(cuts, strides, s, at)),
            default=cuts[at].index,
        )
        inside = [node for node in nodes if start <= _about(node).index <= cuts[at].index]
        if any(_is_spatial(traced, node) for node in inside if node.op != "placeholder"):
            return at
        at = _entry(cuts, start)
    return i


def stages_of(net: nn.Module, plan: Plan) -> tuple[OrderedDict[str, nn.Module], OrderedDict[str, nn.Module]]:
    """Return the map layers and the region layers of a network as modules that share its parameters.

    Args:
        net: of the architecture that the plan is of; what `fused` made of it serves as well.
        plan: its layers.
    """
    traced = trace(net)
    cuts = _layers(traced, with_logits=plan.with_logits)
    by_path = {path: cut for cut in cuts for path in cut.starts}
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    before: _Cut | None = None
    from_last = False
    names = [*plan.maps, *plan.regions]
    for i, name in enumerate(names):
        if len(names) == len(cuts):
            cut = cuts[i]
        elif name in ("penultimate", "logits"):
            cut = cuts[i - len(names)]
        else:
            cut = next(by_path[path] for path in plan.paths[name] if path in by_path)
        to_last = name in plan.last
        stages[name] = _cut_out(traced, before, cut, from_last=from_last, to_last=to_last)
        before, from_last = cut, to_last
    n = len(plan.maps)
    items = list(stages.items())
    return OrderedDict(items[:n]), OrderedDict(items[n:])


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network without memory for its weights, in evaluation mode.

    One that computes with numbers while it is made, which the meta device has none of, is made with them.
    """
    try:
        with torch.device("meta"):
            net = build()
    except RuntimeError:  # of the meta device; a real one is raised again below
        net = build().to("meta")
    return net.eval()


_PROBE, _PERIOD = 128, 64
"""Sides of the images that geometry is found on: what padding depends on repeats with the largest stride."""


class TracedLayers:
    """The layers of an architecture whose graph tells them.

    Args:
        build: makes the module with a number of outputs.
        crop_size: side of the images that it was trained on, in pixels.
        with_logits: whether its output is one number a class.
    """

    def __init__(self, build: Callable[[int], nn.Module], crop_size: int, *, with_logits: bool) -> None:
        self._build, self._crop_size, self._with_logits = build, crop_size, with_logits
        self._axes: dict[int, Mapping[str, LayerInfo]] = {}

    @cached_property
    def plan(self) -> Plan:
        """Names of the layers."""
        return plan_of(self._net, self._crop_size, with_logits=self._with_logits)

    @cached_property
    def _net(self) -> nn.Module:
        return trace(self._of(2 if self._with_logits else 0))

    def _of(self, n_outputs: int) -> nn.Module:
        return on_meta(functools.partial(self._build, n_outputs))

    @cached_property
    def classifier(self) -> tuple[str, ...]:
        """Names of the parameters that have a row for each output."""
        if not self._with_logits:
            return ()
        first, other = self._net.state_dict(), self._of(3).state_dict()
        return tuple(
            name for name, value in first.items() if name in other and value.shape != other[name].shape
        )

    def n_outputs(self, net: nn.Module) -> int | None:
        """Return the length of a network's logits; None where its architecture fixes it."""
        return len(net.get_parameter(self.classifier[0])) if self.classifier else None

    @cached_property
    def _stages(self) -> tuple[OrderedDict[str, nn.Module], OrderedDict[str, nn.Module]]:
        return stages_of(self._net, self.plan)

    @cached_property
    def _on_crop(self) -> tuple[Mapping[str, LayerInfo], int]:
        """Layers on a crop, and the side of the last map."""
        located = OrderedDict(zip([*self.plan.maps, *self.plan.regions], self.plan.located, strict=True))
        if self.plan.last:  # whose axes are brought into order
            maps, regions = self._stages
            layers = OrderedDict([*maps.items(), *regions.items()])
            located = locate(layers, (self._crop_size, self._crop_size))
        entry = located[self.plan.maps[-1]]
        cells = entry.shape[0] - entry.n_prefix if entry.axes == "tokens" else math.prod(entry.shape[1:])
        infos = _infos(located)
        for name in self.plan.regions:
            infos[name] = replace(infos[name], is_map=False, channels=math.prod(located[name].shape))
        return infos, math.isqrt(cells)

    def split(self, net: nn.Module) -> tuple[OrderedDict[str, nn.Module], OrderedDict[str, nn.Module]]:
        """Return the map layers and the region layers of a network of this architecture."""
        return stages_of(net, self.plan)

    @property
    def entry_grid(self) -> int:
        """Side of the last map on a crop, in cells."""
        return self._on_crop[1]

    @cached_property
    def _depends_on_size(self) -> bool:
        first, second = (_infos(locate(self._stages[0], (n, n))) for n in (_PROBE, _PROBE + _PERIOD - 1))
        self._axes[_PROBE] = first
        return first != second

    def _along(self, n: int) -> Mapping[str, LayerInfo]:
        """Return the geometry of the map layers on a square of the kind of `n` pixels."""
        n = _PROBE + n % _PERIOD if self._depends_on_size else _PROBE
        if n not in self._axes:
            self._axes[n] = _infos(locate(self._stages[0], (n, n)))
        return self._axes[n]

    def on(self, size: tuple[int, int]) -> dict[str, LayerInfo]:
        """Return the geometry of every layer on an image of `size` (height, width), by name and in order."""
        on_crop, _ = self._on_crop
        layers, at = {}, (1, (0.5, 0.5))
        for name, info in on_crop.items():
            if name in self.plan.maps:
                columns, rows = self._along(size[1])[name], self._along(size[0])[name]
                problem = info.problem or columns.problem or rows.problem
                at = (
                    (info.stride, info.origin)
                    if problem
                    else (columns.stride, (columns.origin[0], rows.origin[1]))
                )
                layers[name] = replace(info, stride=at[0], origin=at[1], problem=problem)
            else:
                layers[name] = replace(info, stride=at[0], origin=at[1])
        return layers

    @property
    def scales(self) -> tuple[str, str]:
        """Names of the maps that are read where nothing else is said: of stride 16 and 32, or the nearest."""
        strides = sorted(int(name[1:]) for name in self.plan.aliases if re.fullmatch(r"s\d+", name))
        middle = max((stride for stride in strides if stride <= 16), default=strides[0])
        last = min((stride for stride in strides if stride >= 32), default=strides[-1])
        return f"s{middle}", f"s{last}"

    @property
    def trunk_from(self) -> str:
        """The map layer from which on the network is tuned: what follows stride 16, or the last quarter."""
        maps = self.plan.maps
        after = maps.index(self.plan.aliases.get("s16", maps[-1])) + 1
        return maps[after if after < len(maps) else max(1, 3 * len(maps) // 4) % len(maps)]


def _infos(located: Mapping[str, Located]) -> dict[str, LayerInfo]:
    infos: dict[str, LayerInfo] = {}
    before = LayerInfo(3, True, 1, (0.5, 0.5))
    for name, found in located.items():
        before = infos[name] = geometry_of(found, before)
    return infos
