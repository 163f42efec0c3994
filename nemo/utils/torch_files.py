# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with reasons for failures, ``torch.load`` without running code. New in this project."""

import collections
import typing
from pathlib import Path

import omegaconf
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint

PLAIN: list[type] = [bool, bytes, dict, float, int, list, set, str, tuple, collections.defaultdict]
PLAIN += [omegaconf.base.ContainerMetadata, omegaconf.base.Metadata]
PLAIN += [found for found in vars(omegaconf).values() if isinstance(found, type) and issubclass(found, omegaconf.Node)]
READABLE = {f'{found.__module__}.{found.__qualname__}': found for found in PLAIN} | {'typing.Any': typing.Any}

_torch_load = torch.load


class _Ignored:
    """Stands for an object of a class that is not read."""

    __init__ = __setstate__ = lambda self, *args, **kwargs: None


def load(path: str | Path, map_location='cpu'):
    """Load a checkpoint, a file or a folder of sharded weights; ValueError naming it if it cannot be read.

    Nothing in a file is run: tensors, plain values and configs are read, and objects of other classes are replaced by
    placeholders. A folder's index is torch's own pickle, and the file beside its shards is read as Lightning reads it.
    """
    try:
        if Path(path).is_dir():
            return _load_distributed_checkpoint(Path(path))
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(READABLE.get(name, _Ignored), name) for name in unknown]):
            return _torch_load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each have errors of their own
        raise ValueError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:300]}") from error


def save(content, path: str | Path) -> None:
    """Save as ``torch.save`` does; OSError with the cause, such as a full disk, which torch hides."""
    try:
        with open(path, 'wb') as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
