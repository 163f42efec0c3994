# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``save_restore_connector.py``: atomic ``.nemo`` files; errors name broken ones."""

import gzip
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo.utils import torch_files
from nemo.utils.atomic_files import replacing
from nemo.utils.msc_utils import is_multistorageclient_url
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class SaveRestoreConnector(_up.SaveRestoreConnector):
    """NeMo's connector; a save that is cut short leaves the earlier file, and a broken file is named."""

    def save_to(self, model, save_path: str):
        """Save a model as NeMo does; OSError names a file that cannot be written, and the cause."""
        encoder: Any = getattr(model, 'encoder', None)
        if hasattr(encoder, 'write_layer_contexts_to') and 'encoder' in model.cfg:  # those set at run time
            encoder.write_layer_contexts_to(model.cfg.encoder)
        try:
            return super().save_to(model, save_path)
        except OSError as error:
            raise OSError(error.errno, f"could not save {save_path}: {error.strerror or error}") from error

    @staticmethod
    def _save_state_dict_to_disk(state_dict, filepath):
        torch_files.save(state_dict, filepath)

    @staticmethod
    def _make_nemo_file_from_folder(filename, source_dir):
        pack = _up.SaveRestoreConnector._make_nemo_file_from_folder
        if is_multistorageclient_url(filename):
            return pack(filename, source_dir)
        with replacing(filename) as partial:
            pack(str(partial), source_dir)

    @staticmethod
    def _load_state_dict_from_disk(model_weights, map_location='cpu'):
        try:
            if zipfile.is_zipfile(model_weights):  # torch does not read the sums that it writes; 0.7 s for a gigabyte
                with zipfile.ZipFile(model_weights) as archive:
                    if damaged := archive.testzip():
                        raise OSError(f"{damaged} in it is damaged")
            return _up.SaveRestoreConnector._load_state_dict_from_disk(model_weights, map_location)
        except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise zipfile.BadZipFile(f"{os.path.basename(model_weights)}: {error}") from error

    def load_config_and_state_dict(self, calling_cls, restore_path, *args, **kwargs):
        """Read a ``.nemo`` file; arguments and results are NeMo's.

        Raises:
            ValueError: naming the file, if it is truncated or corrupt.
            pickle.UnpicklingError: naming the file, if torch refuses its weights, as in NeMo.
        """
        try:
            with self._naming(restore_path):
                return super().load_config_and_state_dict(calling_cls, restore_path, *args, **kwargs)
        except BaseException:  # or the models that this process builds next would have no data
            calling_cls._set_model_restore_state(is_being_restored=False)
            raise

    def extract_state_dict_from(self, restore_path, save_dir, split_by_module=False):
        """Write the weights of a ``.nemo`` file to a folder; errors as in ``load_config_and_state_dict``."""
        with self._naming(restore_path):
            return super().extract_state_dict_from(restore_path, save_dir, split_by_module)

    @contextmanager
    def _naming(self, path) -> Iterator[None]:
        """Turn the many errors of a broken archive into one that names it."""
        try:
            if self.model_extracted_dir is None and os.path.isfile(path):
                if not self._filtered_tar_info(path, lambda name: name.endswith(self.model_config_yaml)):
                    raise tarfile.ReadError(f"it has no {self.model_config_yaml}")
            yield
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"{path}: {error}") from error
        except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is truncated, corrupt or no .nemo file: {error}") from error
