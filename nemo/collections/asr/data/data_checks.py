# SPDX-License-Identifier: Apache-2.0
"""Check before training that the data can be read, with the code that will read it. New in this project."""

import itertools
import tarfile
from collections import deque
from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path

from lhotse import CutSet
from omegaconf import DictConfig, OmegaConf

from nemo.collections.asr.data.resumable_cuts import resumable_config
from nemo.collections.asr.parts.utils.manifest_index import Line, expanded, index_of, is_remote, paths_in, read_entries
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
from nemo.collections.common.data.lhotse.dataloader import make_structured_with_schema_warnings
from nemo.collections.common.parts.preprocessing.manifest import get_full_path

FIRST = 100  # entries whose audio is looked for
SOURCES = ('manifest_filepath', 'shar_path', 'cuts_path', 'input_cfg')


def check_data(name: str, data_cfg: DictConfig) -> None:
    """Check a data section: open every local source, and look at its first and its last entry.

    Sources elsewhere (``s3://``, ``ais://``, ``pipe:``) are left to their reader.

    Raises:
        ValueError: naming the key, the file, and what is wrong with it.
    """
    use_lhotse, is_tarred, resumable = (data_cfg.get(key) for key in ('use_lhotse', 'is_tarred', 'resumable'))
    for path in paths_in(data_cfg.get('noise_manifest')):
        check_noise(f'{name}.noise_manifest', path)
    if not any(data_cfg.get(key) for key in SOURCES[: None if use_lhotse else 1]):
        raise ValueError(
            f"{name}.manifest_filepath is {data_cfg.get('manifest_filepath')!r}; it must name a manifest"
            f"{', or shar_path, or input_cfg must name the data' if use_lhotse else ''}"
        )
    if not use_lhotse and not is_tarred:
        for path in paths_in(data_cfg.manifest_filepath):
            check_manifest(
                path, f'{name}.manifest_filepath', data_cfg.get('min_duration'), data_cfg.get('max_duration')
            )
        return
    remote = [_check_source(f'{name}.{key}', source) for key, source in sources_in(data_cfg)]
    if not any(remote) and (use_lhotse or resumable is not None):
        check_cuts(name, data_cfg if resumable is None else resumable_config(data_cfg, resumable, ranks=1))


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


def _check_source(key: str, source) -> bool:
    """Check what one section names; return whether it is elsewhere."""
    tars, manifests = (
        [file for path in paths_in(source.get(name)) for file in expanded(path)]
        for name in ('tarred_audio_filepaths', 'manifest_filepath')
    )
    shards = source.get('shar_path')
    shards = [] if isinstance(shards, (dict, DictConfig)) else paths_in(shards)
    for path in manifests:
        check_entries(key, path, () if tars else ('audio_filepath', 'duration'), with_audio=not tars)
    for tar in tars:
        _check_tar(key.replace('manifest_filepath', 'tarred_audio_filepaths'), tar)
    for folder in shards:
        check_shards(folder, key.replace('manifest_filepath', 'shar_path'))
    return any(map(is_remote, (*tars, *manifests, *shards)))


def check_cuts(name: str, data_cfg) -> None:
    """Let NeMo make the cuts of a lhotse section, and take the first within its limits; ValueError has NeMo's reason."""
    config = make_structured_with_schema_warnings(data_cfg)
    config.force_finite = True
    least, most = config.min_duration or 0.0, float('inf') if config.max_duration is None else config.max_duration
    _check_first(
        f'{name}: lhotse cannot read the data',
        lambda: (
            cut for cut in read_cutset_from_config(config)[0] if least <= getattr(cut, 'duration', least) <= most
        ),
        f"{name}, from min_duration = {least} to max_duration = {most} seconds,",
    )


def _check_first(failure: str, open_cuts, where: str) -> None:
    try:
        first = next(iter(open_cuts()), None)
    except Exception as error:  # each reader has errors of its own
        raise ValueError(f"{failure}: {type(error).__name__}: {error}") from error
    if first is None:
        raise ValueError(f"{where} has no entries")


def check_noise(key: str, path: str) -> None:
    """Check a manifest or a folder of shards with noise; raise ValueError naming the key and what is wrong."""
    if Path(expanduser(path)).is_dir():
        check_shards(path, key)
    elif not is_remote(path):
        for file in expanded(path):
            check_entries(key, file)


def check_entries(key: str, path: str, needed: tuple[str, ...] = (), with_audio: bool = True) -> None:
    """Check the entries of a manifest, and the audio of the first and the last; errors are those of :func:`check_manifest`."""
    if is_remote(path):
        return
    _check_is_file(key, path)
    try:
        lines = read_entries(path, needed)
        named = (line for line in lines if line.audio)
        ends = [next(named), *deque(named, maxlen=1)]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    for line in ends if with_audio else ():
        _check_audio(key, line)


def _check_is_file(key: str, path: str, hint: str = '') -> None:
    if not Path(expanduser(path)).is_file():
        raise ValueError(f"{key}: no file {path}{hint}")


def _check_tar(key: str, path: str) -> None:
    if not is_remote(path):
        _check_is_file(key, path)
        try:
            tarfile.open(expanduser(path)).close()
        except tarfile.ReadError as error:
            raise ValueError(f"{key}: {path} is no tar file: {error}") from error


def check_shards(folder: str, key: str) -> None:
    """Check that a folder has shards, and that lhotse reads the first cut; raise ValueError naming the folder."""
    if is_remote(folder):
        return
    for part in ('cuts.000000.jsonl.gz', 'recording.000000.tar'):
        if not list(Path(expanduser(folder)).glob(f"{part.partition('.')[0]}.*")):
            raise ValueError(f"{key}: {folder} has no shards ({part}); prepare_shards.py makes them in OUTPUT/shar")
    read = f'{key}: lhotse cannot read {folder}'
    _check_first(read, lambda: CutSet.from_shar(in_dir=expanduser(folder)), f'{key}: {folder}')


def check_manifest(path: str, key: str, min_duration: float | None = None, max_duration: float | None = None) -> int:
    """Check that a plain manifest can be read and leaves something to train on within the limits, in seconds.

    Returns:
        The number of utterances that are kept; 0 for a manifest in a data store, which is left to its reader.

    Raises:
        ValueError: naming the key, if it is missing, malformed, empty, wholly dropped, or names missing audio.
    """
    if is_remote(path):
        return 0
    is_pattern = path.endswith('.gz') or len(expanded(path)) > 1
    _check_is_file(key, path, '; patterns and compressed manifests need use_lhotse: true' if is_pattern else '')
    if path.endswith('.gz'):
        raise ValueError(f"{key}: {path} is compressed, which needs use_lhotse: true")
    try:
        first = list(itertools.islice(read_entries(path), FIRST))
        index = index_of(expanduser(path))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    for line in first:
        _check_audio(key, line)
    kept = int(index.lasting(min_duration, max_duration).sum())
    if not kept:
        raise ValueError(
            f"{key}: none of the {len(index)} entries of {path} lasts from min_duration = {min_duration} to "
            f"max_duration = {max_duration} seconds"
        )
    return kept


def _check_audio(key: str, line: Line) -> None:
    for file in [line.audio] if isinstance(line.audio, str) else line.audio:
        if not is_remote(file) and not Path(get_full_path(file, manifest_file=line.manifest)).is_file():
            raise ValueError(f"{key}: {line.manifest}, line {line.number}: no audio file {file}")
