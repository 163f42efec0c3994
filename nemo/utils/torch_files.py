# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with the reason of a failure, and ``torch.load`` without running code. New in this project."""

import builtins
import collections
import io
import typing
from pathlib import Path

import omegaconf
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

PLAIN = [getattr(builtins, name) for name in ('bool', 'bytes', 'dict', 'float', 'int', 'list', 'set', 'str', 'tuple')]
PLAIN += [collections.defaultdict, omegaconf.base.ContainerMetadata, omegaconf.base.Metadata]
PLAIN += [found for found in vars(omegaconf).values() if isinstance(found, type) and issubclass(found, omegaconf.Node)]
READABLE = {f'{found.__module__}.{found.__qualname__}': found for found in PLAIN} | {'typing.Any': typing.Any}

_torch_load = torch.load


class _Ignored:
    """Stands for an object of a class that is not read."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load(path: str | Path, map_location='cpu'):
    """Load a checkpoint, a file or a folder of sharded weights; tensors, plain values and configs are read.

    Nothing in a file is run: what has another class is replaced by a placeholder. A folder's index is torch's own pickle.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    try:
        if Path(path).is_dir():
            return _load_folder(Path(path))
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(READABLE.get(name, _Ignored), name) for name in unknown]):
            return _torch_load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each have errors of their own
        raise ValueError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:300]}") from error


def _load_folder(folder: Path) -> dict:
    """Load what Lightning's ``ModelParallelStrategy`` writes: sharded weights, and a file with all else."""
    checkpoint: dict = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(checkpoint, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    return checkpoint | (load(folder / 'meta.pt') if (folder / 'meta.pt').is_file() else {})


def save(content, path: str | Path) -> None:
    """Save as ``torch.save`` does.

    Raises:
        OSError: naming the file and the cause (such as a full disk), which torch's own error leaves out.
    """
    try:
        with _File(io.FileIO(path, 'wb')) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                raise file.error or error from error
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error


class _File(io.BufferedWriter):
    """Keeps the error that torch hides behind its own."""

    error: OSError | None = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise
