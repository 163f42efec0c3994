# SPDX-License-Identifier: Apache-2.0
"""Check before training that the data can be read, with the code that will read it. New in this project."""

import tarfile
from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path

from lhotse import CutSet
from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo.collections.asr.data.resumable_cuts import resumable_config
from nemo.collections.asr.data.ssl_dataset import load_noise_manifest
from nemo.collections.asr.parts.utils.manifest_index import (
    ends_of,
    expanded,
    index_of,
    is_remote,
)
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
from nemo.collections.common.data.lhotse.dataloader import make_structured_with_schema_warnings
from nemo.collections.common.parts.preprocessing.manifest import get_full_path

SOURCES = ('manifest_filepath', 'shar_path', 'cuts_path', 'input_cfg')
SHARD_PARTS = ('cuts', 'recording')


def check_data(name: str, data_cfg: DictConfig) -> None:
    """Check a data section: open every local source, and look at its first and its last entry.

    Sources elsewhere (``s3://``, ``ais://``, ``pipe:``) are left to their reader.

    Raises:
        ValueError: naming the key, the file, and what is wrong with it.
    """
    for path in paths_in(data_cfg.get('noise_manifest')):
        check_noise(f'{name}.noise_manifest', path)
    if not any(data_cfg.get(key) for key in SOURCES[: None if data_cfg.get('use_lhotse') else 1]):
        raise ValueError(
            f"{name}.manifest_filepath is {data_cfg.get('manifest_filepath')!r}; it must name a manifest"
            f"{', or shar_path, or input_cfg must name the data' if data_cfg.get('use_lhotse') else ''}"
        )
    if data_cfg.get('use_lhotse') or data_cfg.get('is_tarred'):
        remote = [_check_source(f'{name}.{key}', source) for key, source in sources_in(data_cfg)]
        resumable = data_cfg.get('resumable')
        if not any(remote) and resumable is not None:
            check_cuts(name, resumable_config(data_cfg, resumable, ranks=1))
        elif not any(remote) and data_cfg.get('use_lhotse'):
            check_cuts(name, data_cfg)
        return
    limits = data_cfg.get('min_duration'), data_cfg.get('max_duration')
    for path in paths_in(data_cfg.manifest_filepath):
        check_manifest(path, f'{name}.manifest_filepath', *limits)


def sources_in(data_cfg) -> Iterator[tuple[str, dict]]:
    """Yield the sections that name data, with the keys that lead to them, those within ``input_cfg`` included."""
    groups = data_cfg.get('input_cfg')
    if groups is None:
        yield 'manifest_filepath', data_cfg
        return
    groups = OmegaConf.load(expanduser(groups)) if isinstance(groups, (str, Path)) else groups
    for number, group in enumerate(groups):
        for key, source in sources_in(group):
            yield f'input_cfg[{number}].{key}', source


def paths_in(value) -> list[str]:
    """Return the paths in a value: a string with commas, a list, a list of lists, or pairs of path and weight."""
    if value is None:
        return []
    if isinstance(value, (str, Path)):
        return str(value).split(',')
    return [path for entry in value if not isinstance(entry, (int, float)) for path in paths_in(entry)]


def _check_source(key: str, source) -> bool:
    """Check what one section names; return whether it is elsewhere."""
    tars = [tar for path in paths_in(source.get('tarred_audio_filepaths')) for tar in expanded(path)]
    manifests = [path for pattern in paths_in(source.get('manifest_filepath')) for path in expanded(pattern)]
    shards = source.get('shar_path')
    shards = [] if shards is None or isinstance(shards, (dict, DictConfig)) else paths_in(shards)
    remote = [path for path in (*tars, *manifests, *shards) if is_remote(path)]
    for path in manifests:
        if path not in remote:
            check_ends(key, path, with_audio=not tars)
    for tar in tars:
        if tar not in remote:
            _check_tar(key.replace('manifest_filepath', 'tarred_audio_filepaths'), tar)
    for folder in shards:
        if folder not in remote:
            check_shards(folder, key.replace('manifest_filepath', 'shar_path'))
    return bool(remote)


def check_cuts(name: str, data_cfg) -> None:
    """Let NeMo make the cuts of a lhotse section, and take the first one.

    Raises:
        ValueError: with NeMo's or lhotse's reason.
    """
    config = make_structured_with_schema_warnings(data_cfg)
    config.force_finite = True
    try:
        first = next(iter(read_cutset_from_config(config)[0]), None)
    except Exception as error:  # each reader has errors of its own
        raise ValueError(f"{name}: lhotse cannot read the data: {type(error).__name__}: {error}") from error
    if first is None:
        raise ValueError(f"{name}: the data have no entries")


def check_noise(key: str, path: str) -> None:
    """Check a manifest or a folder of shards with noise; raise ValueError naming the key and what is wrong."""
    if is_remote(path):
        return
    if Path(expanduser(path)).is_dir():
        check_shards(path, key)
        return
    for file in expanded(path):
        check_ends(key, file)
    try:
        load_noise_manifest(path)
    except Exception as error:  # NeMo's, of a manifest
        raise ValueError(f"{key}: {path} cannot be read: {error}") from error


def check_ends(key: str, path: str, with_audio: bool = True) -> None:
    """Check the first and the last entry of a manifest.

    Raises:
        ValueError: naming the manifest, the line and what is wrong with it.
    """
    try:
        ends = ends_of(path)
    except FileNotFoundError as error:
        raise ValueError(f"{key}: no file {path}") from error
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{key}: {str(error) if path in str(error) else f'{path} cannot be read: {error}'}"
        ) from error
    if not ends:
        raise ValueError(f"{key}: {path} has no entries")
    for number, entry in ends:
        _check_audio(entry, path, f'{key}: {path}, line {number}', with_audio)


def _check_tar(key: str, path: str) -> None:
    if not Path(expanduser(path)).is_file():
        raise ValueError(f"{key}: no file {path}")
    try:
        with tarfile.open(expanduser(path)) as archive:
            archive.next()
    except tarfile.ReadError as error:
        raise ValueError(f"{key}: {path} is no tar file: {error}") from error


def check_shards(folder: str, key: str) -> None:
    """Check that a folder has shards, that none lacks a part, and that lhotse reads the first cut.

    Raises:
        ValueError: naming the folder and what is missing.
    """
    names = {path.name for path in Path(expanduser(folder)).glob('*')}
    numbers = {part: {name.split('.')[1] for name in names if name.startswith(f'{part}.')} for part in SHARD_PARTS}
    if not numbers['cuts']:
        raise ValueError(
            f"{key}: {folder} has no shards (cuts.000000.jsonl.gz); prepare_shards.py makes them in OUTPUT/shar"
        )
    for part in SHARD_PARTS:
        if numbers[part] != numbers['cuts']:
            odd = min(numbers[part] ^ numbers['cuts'])
            raise ValueError(f"{key}: {folder} has shard {odd} only in part: cuts and recording are needed")
    try:
        first = next(iter(CutSet.from_shar(in_dir=expanduser(folder))), None)
    except Exception as error:  # of lhotse, gzip, tarfile
        raise ValueError(f"{key}: lhotse cannot read {folder}: {type(error).__name__}: {error}") from error
    if first is None:
        raise ValueError(f"{key}: {folder} has no entries")


def check_manifest(path: str, key: str, min_duration: float | None = None, max_duration: float | None = None) -> int:
    """Check that a plain manifest can be read and leaves something to train on.

    Args:
        path: a NeMo manifest, one JSON object a line.
        key: the config key that gives it.
        min_duration: utterances shorter than this many seconds are dropped in training; None drops none.
        max_duration: the same for longer ones.

    Returns:
        The number of utterances that are kept; 0 for a manifest in a data store, which is left to its reader.

    Raises:
        ValueError: if it is missing, malformed, empty, wholly dropped, or names missing audio.
    """
    if is_remote(path):
        return 0
    if not Path(expanduser(path)).is_file():
        raise ValueError(f"{key}: no file {path}{_needs_lhotse(path)}")
    if path.endswith('.gz'):
        raise ValueError(f"{key}: {path} is compressed{_needs_lhotse(path)}")
    try:
        index = index_of(expanduser(path))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    for number, entry in index.first:
        _check_audio(entry, path, f'{key}: {path}, line {number}')
    entries, kept = len(index), int(index.lasting(min_duration, max_duration).sum())
    if not entries:
        raise ValueError(f"{key}: {path} has no entries")
    if not kept:
        raise ValueError(
            f"{key}: none of the {entries} entries of {path} lasts from min_duration = {min_duration} to "
            f"max_duration = {max_duration} seconds"
        )
    return kept


def _needs_lhotse(path: str) -> str:
    is_pattern = path.endswith('.gz') or len(expanded(path)) > 1
    return '; patterns and compressed manifests need use_lhotse: true' if is_pattern else ''


def _check_audio(entry: dict, path: str, where: str, with_audio: bool = True) -> None:
    audio = entry.get('audio_filepath', entry.get('audio_filename'))
    if not isinstance(audio, (str, list, ListConfig)):
        raise ValueError(f"{where} has no audio_filepath")
    if not with_audio:
        return
    for file in [audio] if isinstance(audio, str) else audio:
        if not is_remote(file) and not Path(get_full_path(file, manifest_file=expanduser(path))).is_file():
            raise ValueError(f"{where}: no audio file {file}")
