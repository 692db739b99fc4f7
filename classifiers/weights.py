"""Weights files: safetensors that carry what is needed to rebuild the classifier, and a hash of their content.

A checkpoint of Lightning's holds optimizer and loop state and is for resuming; a weights file is for handing a model
on. Neither safetensors nor torch notices a flipped bit: the hash does. Nothing here unpickles code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifiers.torch_files import read_torch
from datamodules.errors import InputError
from datamodules.files import full_path, unwritable
from datamodules.imageset import fingerprint
from datamodules.store import save_tensors

FORMAT = "pharmakon-weights-1"

WEIGHTS = "weights.safetensors"
"""The name of what a run ends with, in its folder."""


@dataclass(frozen=True)
class Architecture:
    """What rebuilds a classifier without its weights.

    Attributes:
        class_path: The backbone's dotted path.
        init_args: Its arguments beside image shape and number of classes; JSON.
        num_classes: K.
        image_shape: (C, H, W).
        mean: Of each channel, for pixels in [0, 1].
        std: Its standard deviation.
    """

    class_path: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    init_args: dict[str, Any] = field(default_factory=dict)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    return fingerprint(*(part for name in sorted(tensors) for part in (name, tensors[name])))


def save_weights(path: Path, tensors: Mapping[str, Tensor], architecture: Architecture) -> str:
    """Write a weights file, atomically.

    Args:
        path: Where to; its folder must exist.
        tensors: The backbone's state.
        architecture: What rebuilds it.

    Returns:
        The content hash.
    """
    # copies: what two layers share is written twice, as safetensors' own reader expects
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    digest = content_hash(plain)
    described = json.dumps(asdict(architecture), sort_keys=True)
    metadata = {"format": FORMAT, "sha256": _seal(digest, described), "architecture": described}
    try:
        save_tensors(path, plain, metadata)
    except OSError as error:
        raise unwritable(path, error) from error
    return digest


def _seal(digest: str, described: str) -> str:
    """The hash a file carries: of its tensors and of the architecture, whose mean and std matter as much."""
    return fingerprint(digest, described)


def find_weights(path: str | Path) -> Path:
    """The file that a path stands for.

    Args:
        path: A file; or the folder of a run, for its ``weights.safetensors``; or the folder of all runs of a config,
            such as ``runs/extractor_mnist``, for that of the newest finished one.

    Raises:
        InputError: If there is none; it names the command that makes it.
    """
    if "://" in str(path):  # before it is a Path, which makes one slash of two
        raise InputError(
            f"weights = {str(path)!r}: a file of this machine is expected; download it, and check who made it"
        )
    path = full_path(path)
    if path.is_file():
        return path
    for found in (path / WEIGHTS, *sorted(path.glob(f"*/{WEIGHTS}"), reverse=True)):  # runs are named by their time
        if found.is_file():
            return found
    if path.suffix:
        remedy = "there is no such file; train it first: lightning fit writes weights.safetensors into the run's folder"
    else:
        remedy = f"no such file, and no finished run in such a folder; make one: lightning fit --config {path.name}"
    raise InputError(f"weights = {str(path)!r}: {remedy}")


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], Architecture | None]:
    """Read the backbone's state from a weights file, or from a Lightning checkpoint of ours.

    Args:
        path: A ``.safetensors`` file, a checkpoint, which is read with ``weights_only``, or what else `find_weights`
            takes.

    Returns:
        The tensors by name, and the architecture where the file carries it.

    Raises:
        InputError: If the file is missing, truncated, altered, from elsewhere, or holds anything but tensors.
    """
    path = find_weights(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return _load_checkpoint(path), None


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], Architecture | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"weights = {str(path)!r}: truncated, or not a safetensors file ({error})") from error
    if not {"sha256", "architecture"} & metadata.keys() and metadata.get("format") != FORMAT:
        return tensors, None  # of another maker
    seal = _seal(content_hash(tensors), metadata.get("architecture", ""))
    if (metadata.get("format"), metadata.get("sha256")) != (FORMAT, seal):
        raise InputError(
            f"weights = {str(path)!r}: the content does not match its hash: it was altered or damaged; get it again"
        )
    try:
        stored = json.loads(metadata["architecture"])
        architecture = Architecture(
            class_path=str(stored["class_path"]),
            init_args=dict(stored["init_args"]),
            num_classes=int(stored["num_classes"]),
            image_shape=(int(stored["image_shape"][0]), int(stored["image_shape"][1]), int(stored["image_shape"][2])),
            mean=tuple(float(part) for part in stored["mean"]),
            std=tuple(float(part) for part in stored["std"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"weights = {str(path)!r}: its description of the architecture is damaged ({error})"
        ) from error
    return tensors, architecture


def _load_checkpoint(path: Path) -> dict[str, Tensor]:
    state = load_checkpoint(path).get("state_dict")
    if not isinstance(state, dict):
        raise InputError(f"weights = {str(path)!r}: a checkpoint without a state_dict")
    named = {unwrapped(name): tensor for name, tensor in state.items() if isinstance(name, str)}
    return {
        name.removeprefix("net."): tensor
        for name, tensor in named.items()
        if name.startswith("net.") and isinstance(tensor, Tensor)
    }


def unwrapped(name: str) -> str:
    """A parameter's name without what wraps the whole module: ``module`` of DDP, ``_orig_mod`` of `torch.compile`."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only``: no code in it can run.

    Raises:
        InputError: If it is truncated or altered, or holds more than tensors and plain values.
    """
    loaded: dict[str, Any] = read_torch(path)
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: not a checkpoint")
    return loaded
