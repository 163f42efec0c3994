# SPDX-License-Identifier: Apache-2.0
"""Check before training that audio can be read and texts be written. New in this project."""

import itertools
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path

from lhotse import CutSet
from omegaconf import DictConfig, OmegaConf

from nemo.collections.asr.data.resumable_cuts import resumable_config
from nemo.collections.asr.parts.utils.manifest_index import Line, expanded, index_of, is_remote, paths_in, read_entries
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
from nemo.collections.common.data.lhotse.dataloader import make_structured_with_schema_warnings
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils import logging
from nemo.utils.left_out import LEFT_OUT

SOURCES = ('manifest_filepath', 'shar_path', 'cuts_path', 'input_cfg')


def check_data(name: str, data_cfg: DictConfig) -> None:
    """Check a data section: open every local source, and look at its first and its last entry.

    Sources elsewhere (``s3://``, ``ais://``, ``pipe:``) are left to their reader. ValueError names the key, the file and the fault.
    """
    use_lhotse, is_tarred, resumable = (data_cfg.get(key) for key in ('use_lhotse', 'is_tarred', 'resumable'))
    check_noise = lambda path: (_check_shards if Path(expanduser(path)).is_dir() else _check_entries)(path)
    _check_paths(f'{name}.noise_manifest', data_cfg.get('noise_manifest'), check_noise)
    if not any(data_cfg.get(key) for key in SOURCES[: None if use_lhotse else 1]):
        raise ValueError(
            f"{name}.manifest_filepath is {data_cfg.get('manifest_filepath')!r}; it must name a manifest"
            f"{', or shar_path, or input_cfg must name the data' if use_lhotse else ''}"
        )
    if not use_lhotse and not is_tarred:
        limits = data_cfg.get('min_duration'), data_cfg.get('max_duration')
        for path in paths_in(data_cfg.manifest_filepath):
            check_manifest(path, f'{name}.manifest_filepath', *limits)
        return
    remote = [_check_source(f'{name}.{prefix}', source) for prefix, source in sources_in(data_cfg)]
    if not any(remote) and (use_lhotse or resumable is not None):
        config = data_cfg if resumable is None else resumable_config(data_cfg, resumable, ranks=1)
        config = make_structured_with_schema_warnings(config)
        config.force_finite = True
        least, most = config.min_duration or 0.0, float('inf') if config.max_duration is None else config.max_duration
        with _naming(name):
            _check_first('the data', lambda: read_cutset_from_config(config)[0], least, most)
    LEFT_OUT.clear()  # what the check came upon is counted when it is read


def sources_in(data_cfg) -> Iterator[tuple[str, dict]]:
    """Yield the sections that name data, those in ``input_cfg`` included, each after the path to its keys."""
    groups = data_cfg.get('input_cfg')
    if groups is None:
        yield '', data_cfg
        return
    groups = OmegaConf.load(expanduser(groups)) if isinstance(groups, (str, Path)) else groups
    for number, group in enumerate(groups):
        for prefix, source in sources_in(group):
            yield f'input_cfg[{number}].{prefix}', source


def check_manifest(path: str, key: str, min_duration: float | None = None, max_duration: float | None = None) -> int:
    """Return how many utterances of a local manifest are within the limits, in seconds; else 0.

    ValueError names the key, if the manifest is missing, malformed, empty, wholly dropped, or names missing audio.
    """
    if is_remote(path):
        return 0
    with _naming(key):
        if path.endswith('.gz') or len(expanded(path)) > 1:
            raise ValueError(f"{path} is compressed or a pattern, which needs use_lhotse: true")
        [file] = _local_files(path)
        for line in itertools.islice(read_entries(file), 100):
            _check_audio(line)
        index = index_of(file)
        kept = int(index.lasting(min_duration, max_duration).sum())
        if not kept:
            raise ValueError(
                f"none of the {len(index)} entries of {path} lasts from {min_duration=} to {max_duration=} s"
            )
    return kept


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_paths(key: str, value, check: Callable) -> bool:
    """Check the paths in the value of a key; return whether one is elsewhere."""
    paths = paths_in(value)
    for path in paths:
        with _naming(key):
            check(path)
    return any(map(is_remote, paths))


def _check_source(prefix: str, source) -> bool:
    """Check what one section names; return whether it is elsewhere."""
    tars, shards = source.get('tarred_audio_filepaths'), source.get('shar_path')
    needed: tuple[str, ...] = () if tars else ('audio_filepath', 'duration')
    check_entries = partial(_check_entries, needed=needed, with_audio=not tars)
    remote = [
        _check_paths(f'{prefix}manifest_filepath', source.get('manifest_filepath'), check_entries),
        _check_paths(f'{prefix}tarred_audio_filepaths', tars, _check_tar),
        _check_paths(f'{prefix}shar_path', None if isinstance(shards, (dict, DictConfig)) else shards, _check_shards),
    ]
    return any(remote)


def _local_files(pattern: str) -> list[str]:
    files = [] if is_remote(pattern) else expanded(pattern)
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"no file {path}")
    return files


def _check_entries(pattern: str, needed: tuple[str, ...] = (), with_audio: bool = True) -> None:
    """Check the entries of manifests, and the audio of the first and the last of each."""
    for path in _local_files(pattern):
        named = (line for line in read_entries(path, needed) if line.audio)
        ends = [next(named), *deque(named, maxlen=1)]
        for line in ends if with_audio else ():
            _check_audio(line)


def _check_tar(pattern: str) -> None:
    for path in _local_files(pattern):
        if not tarfile.is_tarfile(path):
            raise ValueError(f"{path} is no tar file")


def _check_shards(folder: str) -> None:
    if is_remote(folder):
        return
    for part in ('cuts.000000.jsonl.gz', 'recording.000000.tar'):
        if not list(Path(expanduser(folder)).glob(f"{part.partition('.')[0]}.*")):
            raise ValueError(f"{folder} has no shards ({part}); prepare_shards.py makes them in OUTPUT/shar")
    _check_first(folder, lambda: CutSet.from_shar(in_dir=expanduser(folder)))


def _check_first(what: str, open_cuts: Callable, least: float = 0.0, most: float = float('inf')) -> None:
    try:
        first = next((cut for cut in open_cuts() if least <= getattr(cut, 'duration', least) <= most), None)
    except Exception as error:  # each reader has errors of its own
        raise ValueError(f"lhotse cannot read {what}: {type(error).__name__}: {error}") from error
    if first is None:
        raise ValueError(f"{what}, from min_duration = {least} to max_duration = {most} seconds, has no entries")


def _check_audio(line: Line) -> None:
    for file in [line.audio] if isinstance(line.audio, str) else line.audio:
        if not is_remote(file) and not Path(get_full_path(file, manifest_file=line.manifest)).is_file():
            raise ValueError(f"{line.place}: no audio file {file}")


def texts_of(section) -> Iterator[str]:
    """Yield the texts of a data section's local manifests; ValueError names a line without text."""
    for _, source in sources_in(section):
        for pattern in itertools.filterfalse(is_remote, paths_in(source.get('manifest_filepath'))):
            for line in read_entries(pattern):
                if not isinstance(line.entry.get('text'), str):
                    raise ValueError(f"{line.place} has no text")
                yield line.entry['text']


def characters_of(section) -> list[str]:
    """Return the characters of all texts of a data section, sorted; raise ValueError if there are none."""
    found = set().union(*texts_of(section))
    if not found:
        raise ValueError("the manifests have no texts; set model.labels")
    return sorted(found)


def report_unknown_characters(key: str, section, model) -> dict[str, int]:
    """Log the characters of a section's texts that a recogniser cannot write, and how often each occurs."""
    if model.cfg.get('tokenizer') is None:
        is_known = set(model.cfg.labels).__contains__
    else:
        pieces = model.tokenizer
        is_known = lambda character: character.isspace() or pieces.unk_id not in pieces.text_to_ids(character)
    counts = Counter(itertools.chain.from_iterable(texts_of(section))).most_common()
    unknown = {character: count for character, count in counts if not is_known(character)}
    if unknown:
        named = ', '.join(f'{character!r} {count}' for character, count in unknown.items())
        logging.warning(f"{key}: the model's labels lack {named}; without them the references have other words")
    return unknown
