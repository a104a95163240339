"""Make a trained network quick to evaluate, with the same outputs up to rounding.

Batch normalisation is folded into the convolution before it; on CPUs a convolution and its activation become
one oneDNN call, which spares a pass over every map (MobileNetV2: 1.6 times faster); memory runs
channels-last, and pooling by two becomes two maxima. Fully connected layers are computed by the faster of
two libraries, see `products`. Where a map would not fit into the cache, the blocks of MobileNetV2 and
EfficientNet-Lite run over it in strips.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.mobilenetv2 import InvertedResidual

from rcnn_svm.networks.efficientnet_lite import InvertedBottleneck, SameConv2d, same_pads
from rcnn_svm.networks.products import FusedLinear, has_onednn
from rcnn_svm.networks.tracing import join_notes, trace

__all__ = ["absorb_batch_norm", "fuse_for_inference", "fuse_graph"]

_PACKS = has_onednn("_reorder_convolution_weight")
_LARGE_BYTES, _STRIP_BYTES = 16 << 20, 4 << 20
"""Hidden maps above the first run in strips of about the second."""


def fuse_for_inference(net: nn.Module, device: str = "cpu") -> nn.Module:
    """Return a copy of `net` for evaluation on `device`; `net` itself is left alone."""
    fused = copy.deepcopy(net).eval().requires_grad_(False)
    _fold_batch_norm(fused)
    if torch.device(device).type == "cpu":
        if has_onednn("_convolution_pointwise"):
            _fuse_convolutions(fused)
        _simplify_pooling(fused)
        _cut_into_strips(fused)
        _fuse_linear(fused)
    moved: nn.Module = fused.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def fuse_graph(net: nn.Module, device: str = "cpu") -> nn.Module:
    """Do the same for a network whose layers are found in its graph: what follows what is read there.

    Blocks of timm that can become one convolution do. A residual sum and the activation after it join the
    convolution before them.
    """
    fused = copy.deepcopy(net).eval().requires_grad_(False)
    _merge_branches(fused)
    traced = trace(fused, merged=True)
    _drop_idle(traced)
    _fold_in_graph(traced)
    if torch.device(device).type == "cpu" and has_onednn("_convolution_pointwise"):
        _fuse_in_graph(traced)
    traced.graph.lint()
    traced.recompile()
    moved: nn.Module = traced.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _merge_branches(module: nn.Module) -> None:
    """Let blocks that can become one convolution do so; some replace themselves."""
    for name, child in list(module.named_children()):
        if hasattr(child, "fuse"):
            setattr(module, name, child.fuse())  # type: ignore[operator]
        elif hasattr(child, "reparameterize"):
            child.reparameterize()  # type: ignore[operator]
        elif hasattr(child, "switch_to_deploy"):
            child.switch_to_deploy()  # type: ignore[operator]
        else:
            _merge_branches(child)


def _called(traced: fx.GraphModule, node: object) -> nn.Module | None:
    """Return the module that a node calls, if it is the only one to call it."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    calls = [
        other for other in traced.graph.nodes if other.op == "call_module" and other.target == node.target
    ]
    return traced.get_submodule(str(node.target)) if len(calls) == 1 else None


def _put(traced: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Let a node call another module."""
    parent, _, name = str(node.target).rpartition(".")
    setattr(traced.get_submodule(parent), name, module)


def _replace(traced: fx.GraphModule, node: fx.Node, by: fx.Node) -> None:
    by.meta = {**node.meta, **by.meta}
    node.replace_all_uses_with(by)
    traced.graph.erase_node(node)


def _drop_idle(traced: fx.GraphModule) -> None:
    """Leave out dropout and identities between two steps that need each other alone."""
    for node in list(traced.graph.nodes):
        module = _called(traced, node)
        if isinstance(module, nn.Identity | nn.Dropout):
            before = node.args[0]
            if isinstance(before, fx.Node) and len(before.users) == 1 and before.op != "placeholder":
                join_notes(before, node)
                _replace(traced, node, before)


def _fold_in_graph(traced: fx.GraphModule) -> None:
    for conv_node, node, conv, norm in _normalised_in_graph(traced):
        _put(traced, conv_node, fuse_conv_bn_eval(conv, norm))
        activation = getattr(norm, "act", nn.Identity())  # of timm's BatchNormAct2d
        if isinstance(activation, nn.Identity):
            join_notes(conv_node, node)
            _replace(traced, node, conv_node)
        else:
            _put(traced, node, activation)


def _fuse_in_graph(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        conv = _called(traced, node)
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        last, other = node, None
        follower = _only_user(node)
        if follower is not None and _is_sum(follower):
            others = [arg for arg in follower.args if arg is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                last, other, follower = follower, others[0], _only_user(follower)
        activation = _activation(_called(traced, follower)) if follower is not None else None
        if activation is not None and (other is None or activation[0] == "relu"):
            assert follower is not None
            last = follower
        else:
            activation = None
        _put(traced, node, _FusedConv(conv, *(activation or ("none", []))))
        if last is node:
            continue
        with traced.graph.inserting_before(last):
            joint = traced.graph.call_module(
                str(node.target), (node.args[0],) if other is None else (node.args[0], other)
            )
        step = node
        while step is not last:
            after = _only_user(step)
            assert after is not None
            join_notes(step, after)
            after.meta = {**after.meta, **step.meta}
            step = after
        _replace(traced, last, joint)
    traced.graph.eliminate_dead_code()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd, torch.add) and len(node.args) == 2 and not node.kwargs


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold wherever a normalisation is registered right after its convolution, as torchvision does."""
    children = list(module.named_children())
    for (name, child), (next_name, follower) in itertools.pairwise(children):
        if isinstance(child, nn.Conv2d) and isinstance(follower, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(child, follower))
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        _fold_batch_norm(child)


def absorb_batch_norm(module: nn.Module) -> None:
    """Move every normalisation's scale into the convolution before it, in place, for training.

    The function stays the same up to rounding and so do the names of all parameters; what is left of
    the normalisation is a shift. Steps of one size then mean about the same change in every layer.
    """
    for conv, norm in _normalised(module):
        folded = fuse_conv_bn_eval(conv, norm)
        assert folded.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            conv.weight.copy_(folded.weight)
            if conv.bias is not None:
                conv.bias.zero_()
            norm.bias.copy_(folded.bias)
            norm.weight.fill_(1)
            norm.running_mean.fill_(0)
            norm.running_var.fill_(1 - norm.eps)


def _normalised(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield convolutions with the normalisation that follows: in a graph, else as they are registered."""
    if isinstance(module, fx.GraphModule):
        for _, _, conv, norm in _normalised_in_graph(module):
            yield conv, norm
        return
    for first, follower in itertools.pairwise(module.children()):
        if isinstance(first, nn.Conv2d) and isinstance(follower, nn.BatchNorm2d):
            yield first, follower
    for child in module.children():
        yield from _normalised(child)


def _normalised_in_graph(
    traced: fx.GraphModule,
) -> Iterator[tuple[fx.Node, fx.Node, nn.Conv2d, nn.BatchNorm2d]]:
    """Yield convolutions that a normalisation alone reads, as nodes and as modules."""
    for node in list(traced.graph.nodes):
        norm, before = _called(traced, node), next(iter(node.all_input_nodes), None)
        conv = _called(traced, before)
        if before is None or not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
            continue
        if len(before.users) == 1 and norm.running_mean is not None:
            yield before, node, conv, norm


def _activation(module: nn.Module | None) -> tuple[str, list[float]] | None:
    if isinstance(module, nn.ReLU6):
        return "hardtanh", [0.0, 6.0]
    if isinstance(module, nn.ReLU):
        return "relu", []
    if isinstance(module, nn.SiLU):
        return "swish", []
    if isinstance(module, nn.Hardswish):
        return "hardswish", []
    return None


def _followers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module | None]]:
    """Yield each child of a Sequential with the next one that does anything at evaluation."""
    children = list(module.named_children()) if isinstance(module, nn.Sequential) else []
    for i, (name, child) in enumerate(children):
        later = [c for c in children[i + 1 :] if not isinstance(c[1], nn.Identity | nn.Dropout)]
        yield name, child, *(later[0] if later else ("", None))


def _fuse_convolutions(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, child, next_name, follower in _followers(module):
            activation = None if follower is None else _activation(follower)
            if isinstance(child, nn.Conv2d) and child.padding_mode == "zeros":
                # Without an activation too: left to itself, torch takes 1 x 1 kernels to MKL on one thread.
                setattr(module, name, _FusedConv(child, *(activation or ("none", []))))
                if activation:
                    setattr(module, next_name, nn.Identity())


def _simplify_pooling(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d) and _is_pairwise(child):
                setattr(module, name, _PairwiseMaxPool(2))


def _is_pairwise(pool: nn.MaxPool2d) -> bool:
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (2, 2, 0, 1, False)


def _cut_into_strips(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, InvertedResidual):
                setattr(module, name, _Strips(child, 3, child.stride))
            elif isinstance(child, InvertedBottleneck):
                setattr(module, name, _Strips(child, child.kernel, child.stride))


class _Strips(nn.Module):
    """An inverted residual that runs over a large image strip by strip.

    Its hidden map is several times larger than what it reads and writes (for block2 of MobileNetV2 and an
    image of 800 pixels 46 MB). It would leave the cache, and come in fresh pages from the system each time.

    Args:
        block: with one convolution that looks beyond a cell.
        kernel: its side, 3 or 5.
        stride: 1 or 2.

    References:
        Sandler et al., MobileNetV2, arXiv 1801.04381, section 5 (the same idea by channels).
    """

    def __init__(self, block: nn.Module, kernel: int, stride: int) -> None:
        super().__init__()
        self.block = block
        self._stride = stride
        self._margin = (kernel - 1) // 2
        self._n_hidden = max(len(weight) for weight in block.state_dict().values() if weight.ndim == 4)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        row_bytes = x.element_size() * self._n_hidden * width
        if n > 1 or height * row_bytes <= _LARGE_BYTES:
            return self.block(x)  # type: ignore[no-any-return]
        stride, n_rows = self._stride, -(-height // self._stride)
        step = max(1, _STRIP_BYTES // (row_bytes * stride))
        # A strip is read with rows around it, and what the block's padding spoils is dropped. With stride 2
        # TensorFlow's 'same' padding depends on the parity of the height: a strip keeps the image's.
        above = -(-self._margin // stride)  # rows of the result
        below = self._margin if stride == 1 else 2 - height % 2
        strips = []
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            spoilt = min(above, start)
            first = stride * (start - spoilt)
            rows = self.block(x[:, :, first : stride * stop + below])
            strips.append(rows[:, :, spoilt : spoilt + stop - start])
        return torch.cat(strips, dim=2)


def _fuse_linear(net: nn.Module) -> None:
    """Fuse every fully connected layer of a matrix's size; ConvNeXt's work on maps and stay."""
    for module in list(net.modules()):
        for name, child, next_name, follower in _followers(module):
            if isinstance(child, nn.Linear) and not isinstance(follower, nn.GELU) and not _in_map(module):
                relu = isinstance(follower, nn.ReLU)
                setattr(module, name, FusedLinear(child, relu=relu))
                if relu:
                    setattr(module, next_name, nn.Identity())


def _in_map(module: nn.Module) -> bool:
    return any(isinstance(child, nn.LayerNorm) for child in module.children())


class _PairwiseMaxPool(nn.MaxPool2d):
    """Max pooling of 2 x 2 cells, as the larger of two rows and then of two columns, for evaluation on CPUs.

    On channels-last maps of few channels it takes a third of the time of torch's, which finds out as well
    where each maximum was.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side // 2 * 2 for side in x.shape[2:])  # an odd row or column is left out
        rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


class _FusedConv(nn.Module):
    """A convolution, the sum with another tensor, and its activation as one oneDNN call, for CPUs.

    The weights are kept in the blocks that oneDNN reads. Otherwise every call brings them into these anew,
    which takes half of the time where many channels meet a map of 7 x 7 cells.
    """

    weight: Tensor

    def __init__(self, conv: nn.Conv2d, activation: str, scalars: list[float]) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self._padding: list[Any] = list(conv.padding)
        self._same = (conv.kernel_size[0], conv.stride[0]) if isinstance(conv, SameConv2d) else None
        self._steps: tuple[Any, ...] = (list(conv.stride), list(conv.dilation), conv.groups)
        self._activation, self._scalars = activation, scalars
        # No buffer: the blocks are oneDNN's own and cannot be moved or cast. They suit the first map best.
        self._blocks: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}  # they can be neither copied nor pickled

    def _weights(self, x: Tensor, padding: list[Any]) -> Tensor:
        if self._blocks is None:
            if not _PACKS or not x.numel():
                return self.weight
            self._blocks = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, padding, *self._steps, list(x.shape)
            )
        return self._blocks

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        padding = self._padding
        if self._same is not None:
            left, right, above, below = same_pads(x, *self._same)
            if left == right and above == below:
                padding = [above, left]
            else:  # oneDNN is given the same zeros on both sides only
                x = functional.pad(x, (left, right, above, below))
        weight = self._weights(x, padding)
        y: Tensor
        if other is not None:
            if self._is_smaller(x, other, padding):
                y = torch.ops.mkldnn._convolution_pointwise(
                    x, weight, self.bias, padding, *self._steps, "none", [], ""
                )
                return functional.relu(y + other) if self._activation == "relu" else y + other
            activation = None if self._activation == "none" else self._activation
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, other, weight, self.bias, padding, *self._steps, "add", 1.0, activation, [], None
            )
            return y
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, padding, *self._steps, self._activation, self._scalars, ""
        )
        return y

    def _is_smaller(self, x: Tensor, other: Tensor, padding: list[Any]) -> bool:
        """Whether the convolution has fewer cells than what it is added to: oneDNN would leave the rest."""
        stride, dilation, _ = self._steps
        sizes = zip(x.shape[2:], self.weight.shape[2:], padding, stride, dilation, strict=True)
        own = (len(x), len(self.weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in sizes))
        return tuple(torch.broadcast_shapes(own, other.shape)) != own  # type: ignore[no-untyped-call]
