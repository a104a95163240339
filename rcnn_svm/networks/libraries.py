"""Networks of torchvision and timm by name: `torchvision:regnet_y_400mf`, `timm:hgnetv2_b0`.

timm is imported when a name asks for it.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model_weights

from rcnn_svm.errors import ConfigError, DependencyError
from rcnn_svm.networks import trained_to_detect
from rcnn_svm.networks.architectures import ARCHITECTURES, Architecture
from rcnn_svm.networks.tracing import on_meta

__all__ = ["architecture_named", "default_member", "is_named", "timm_settings", "unknown_network"]

_LIBRARIES = ("timm", "torchvision")
_DEFAULT = "IMAGENET1K_V1"
"""The weights that exist for every classifier of torchvision that is described by hand."""


def is_named(name: str) -> bool:
    """Whether a name is that of a network of ours or of a library, so that it needs no object beside it."""
    return name in ARCHITECTURES or name.partition(":")[0] in _LIBRARIES


@functools.cache
def architecture_named(name: str, *, with_logits: bool = True) -> Architecture:
    """Return the architecture of a name.

    Args:
        name: one of `ARCHITECTURES`, `torchvision:NAME`, or `timm:NAME` or `timm:NAME.TAG`.
        with_logits: of a library's network: whether it has a layer of logits.

    Raises:
        ConfigError: no such network.
        DependencyError: timm is not installed.
    """
    library, colon, model = name.partition(":")
    if colon and library == "torchvision":
        return _of_torchvision(name, model, with_logits)
    if colon and library == "timm":
        return _of_timm(name, model, with_logits)
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"Backbone: name must be one of {', '.join(ARCHITECTURES)}, or timm:NAME or torchvision:NAME, "
            f"got {name!r}."
        )
    return ARCHITECTURES[name]


def unknown_network(library: str, model: str, names: list[str]) -> ConfigError:
    """Return the error for a network that is none of `names`."""
    near = difflib.get_close_matches(model, names, 4)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"{library} has no network {model!r}.{meant}")


def _described(name: str, build: Callable[[int], nn.Module], **settings: Any) -> Architecture:
    """Do what `Architecture.of_graph` does, under a name that it lets nobody give a network of their own."""
    return replace(Architecture.of_graph("network", build, **settings), name=name)


def _of_torchvision(name: str, model: str, with_logits: bool) -> Architecture:
    names = torchvision.models.list_models(module=torchvision.models)
    if trained_to_detect(name):
        raise ConfigError(
            f"{name}: was trained to detect, and is read as it is by `train`, `compare` and `extract --path "
            f"shared`. Name a network that classifies."
        )
    if model not in names:
        raise unknown_network("torchvision", model, names)
    shown = default_member(get_model_weights(model).__members__).transforms()
    extra: dict[str, Any] = {}
    if model in ("googlenet", "inception_v3"):  # branches of its training alone
        extra = {"aux_logits": False, "init_weights": False}

    def build(n_outputs: int) -> nn.Module:
        net: nn.Module = torchvision.models.get_model(
            model, weights=None, num_classes=n_outputs or 1, **extra
        )
        if not n_outputs:  # without the last layer, as timm makes them
            path = [name for name, part in net.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, nn.Identity())
        return net

    return _described(
        name,
        build,
        with_logits=with_logits,
        crop_size=int(shown.crop_size[0]),
        mean=tuple(shown.mean),
        std=tuple(shown.std),
    )


def default_member(members: Mapping[str, Any]) -> Any:
    """Return the weights of a network of torchvision that are taken where none are named."""
    return members.get(_DEFAULT) or next(iter(members.values()))


def timm_settings(model: str) -> Any:
    """Return timm's `PretrainedCfg` of a network: what its weights were trained on, where they are, licence.

    Args:
        model: `NAME` or `NAME.TAG`.

    Raises:
        ConfigError: no such network or tag.
        DependencyError: timm is not installed.
    """
    timm = _timm()
    base, _, tag = model.partition(".")
    if not timm.is_model(base):
        raise unknown_network("timm", base, timm.list_models())
    try:
        settings = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # no such tag
        tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
        raise ConfigError(
            f"timm:{base} must have one of the tags {', '.join(tags) or '(none)'}, got {tag!r}."
        ) from error
    if settings is None:
        return timm.models.PretrainedCfg()
    return settings


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise DependencyError(
            "A network timm:NAME needs timm, which is not installed. Run `pip install rcnn-svm[timm]`."
        ) from error
    return timm


_FLEXIBLE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
    {},
)
"""Settings by which transformers take images of several sizes, of which a network may know some or none."""


def _of_timm(name: str, model: str, with_logits: bool) -> Architecture:
    settings = timm_settings(model)
    if settings.input_size[0] != 3 or settings.input_size[1] != settings.input_size[2]:
        raise ConfigError(f"{name}: must read square images of three colours, got {settings.input_size}.")
    base = model.partition(".")[0]
    return _described(
        name,
        _builder(base, settings),
        with_logits=with_logits,
        crop_size=settings.input_size[1],
        mean=tuple(settings.mean),
        std=tuple(settings.std),
    )


def _builder(base: str, settings: Any) -> Callable[[int], nn.Module]:
    timm = _timm()

    @functools.cache
    def flexible() -> dict[str, Any]:
        for options in _FLEXIBLE:
            try:
                on_meta(lambda: make(2, options))  # noqa: B023
            except TypeError:  # it has no such setting
                continue
            return options
        return {}

    def make(n_outputs: int, options: dict[str, Any]) -> nn.Module:
        net: nn.Module = timm.create_model(
            base, pretrained=False, pretrained_cfg=settings, num_classes=n_outputs, **options
        )
        return net

    return lambda n_outputs: make(n_outputs, flexible())
