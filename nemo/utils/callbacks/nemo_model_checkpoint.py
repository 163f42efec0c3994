# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``nemo_model_checkpoint.py``: an interrupted save loses no checkpoint."""

import shutil
import zipfile
from pathlib import Path

from lightning.fabric.plugins import TorchCheckpointIO

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils import logging, torch_files
from nemo.utils.atomic_files import remove_partial_files, replacing
from nemo.utils.get_rank import is_global_rank_zero
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their target, since Lightning copies non-atomically."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Save a checkpoint; errors of a local file are those of ``replacing``."""
        if storage_options is not None or '://' in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch_files.save(checkpoint, partial)


class NeMoModelCheckpoint(_up.NeMoModelCheckpoint):
    """NeMo's checkpoints, complete or absent.

    NeMo marks a checkpoint ``-unfinished`` while it is written or removed, and refuses to resume if the only last
    checkpoint bears the mark, or if there are two. A file that is written atomically is good in spite of the mark,
    and of two last checkpoints a run continues from the newer.
    """

    def setup(self, trainer, pl_module, stage: str) -> None:
        """Clear what a killed run left, and write whole files from now on."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.dirpath and is_global_rank_zero():
            self._remove_unfinished_checkpoints(self.dirpath)
        super().setup(trainer, pl_module, stage)

    @staticmethod
    def is_checkpoint_unfinished(checkpoint_path) -> bool:
        """Whether not to resume from a checkpoint: it is unfinished, or there is a newer last one."""
        marked, path = _up.NeMoModelCheckpoint.is_checkpoint_unfinished(checkpoint_path), Path(checkpoint_path)
        if not path.is_file():
            return marked
        return (marked and not zipfile.is_zipfile(path)) or _newer_last_checkpoint(path) is not None

    @staticmethod
    def _remove_unfinished_checkpoints(checkpoint_dir) -> None:
        for path in remove_partial_files(checkpoint_dir):
            logging.warning(f'Removed {path}, left by a run that was killed while it wrote')
        for path in list(Path(checkpoint_dir).glob('*.ckpt')):
            marker = NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(path)
            if newer := _newer_last_checkpoint(path):
                logging.warning(f'Removing {path}: {newer.name} is newer')
                path.unlink()
            elif marker.is_file() and path.is_dir():  # NeMo 2.5.3 takes it for a file
                logging.warning(f'Removing {path}: it is unfinished')
                shutil.rmtree(path)
            elif zipfile.is_zipfile(path):
                marker.unlink(missing_ok=True)
        _up.NeMoModelCheckpoint._remove_unfinished_checkpoints(checkpoint_dir)

    def _backup_existing_nemo_ckpt(self, trainer):
        """Keep no copy of a ``.nemo`` file that is replaced in one step: killed, NeMo leaves only the copy."""
        if not isinstance(trainer.lightning_module._save_restore_connector, SaveRestoreConnector):
            return super()._backup_existing_nemo_ckpt(trainer)


def _newer_last_checkpoint(path: Path) -> Path | None:
    """Return the newest whole last checkpoint of the same run beside a last one, if it is another.

    torch's files are zip archives, whose table of contents comes last: one that has it is whole.
    """
    others = path.parent.glob('*last.ckpt') if path.name.endswith('last.ckpt') else ()
    of_run = [other for other in others if other.name.partition('--')[0] == path.name.partition('--')[0]]
    whole = [other for other in of_run if other.is_file() and zipfile.is_zipfile(other)]
    newest = max(whole, key=lambda other: (other.stat().st_mtime_ns, other.name), default=path)
    return None if newest == path else newest
