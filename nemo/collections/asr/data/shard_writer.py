# SPDX-License-Identifier: Apache-2.0
"""Pack utterances of manifests into shards with lhotse's writer, shard by shard, in several processes. New in this project."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.shar import SharWriter
from tqdm import tqdm

from nemo.collections.asr.data.ssl_dataset import LEAST_SHARE_OF_DURATION, BadAudioError
from nemo.collections.asr.parts.utils.manifest_index import Line, read_entries
from nemo.collections.asr.parts.utils.nonfinite_guard import samples_are_valid
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.atomic_files import replacing

TOLERANCE = 0.02  # seconds that a duration may differ by when it is read back; codecs pad
TAKEN = ('audio_filepath', 'audio_filename', 'duration', 'offset', 'text', 'speaker', 'lang')  # have places in a cut


@dataclass
class Plan:
    """All that the shards are a function of; a folder holds shards of one plan."""

    manifests: list[str]
    digests: list[str]
    shard_size: int
    format: str
    sample_rate: int | None
    min_duration: float
    max_duration: float
    shuffle: int | None

    def claim(self, folder: Path) -> None:
        """Make a folder one of this plan.

        Raises:
            ValueError: if it is one of another plan, with the first difference.
        """
        path, mine = folder / 'plan.json', asdict(self)
        if path.exists():
            found = json.loads(path.read_text())
            for name, value in mine.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"--output {folder} has shards with {name} {found.get(name)}, not {value}; take another folder, "
                        "or remove it"
                    )
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(mine, indent=1) + '\n')


class Shard(NamedTuple):
    """What a process writes at once."""

    number: int
    lines: list[Line]


@dataclass
class ShardReport:
    """What became of a shard."""

    number: int
    utterances: int = 0
    seconds: float = 0.0
    bad: list[dict] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each file by name."""


def cut_of(line: Line, number: int) -> MonoCut:
    """Return the cut of a manifest's entry; the audio is not read, but for its header.

    Raises:
        Exception: of the audio library, if the file cannot be opened.
    """
    entry = line.entry
    path = get_full_path(audio_of(entry), manifest_file=line.manifest)
    name = f'{Path(path).stem}-{number}'
    recording = Recording.from_file(path, recording_id=name)
    offset = entry.get('offset') or 0.0
    duration = entry.get('duration')
    left = recording.duration - offset
    cut = recording.to_cut()
    if left <= 0:
        raise BadAudioError(f"it lasts {recording.duration:.2f} s, and the utterance begins at {offset}")
    if offset or (duration is not None and duration < left):
        cut = cut.truncate(offset=offset, duration=min(duration or left, left))
    if duration is not None and cut.duration < LEAST_SHARE_OF_DURATION * duration:
        raise BadAudioError(f"it lasts {left:.2f} s, the manifest says {duration:.2f}")
    cut = cut.with_id(name)
    cut.supervisions = [
        SupervisionSegment(
            id=name,
            recording_id=name,
            start=0.0,
            duration=cut.duration,
            text=entry.get('text'),
            speaker=entry.get('speaker'),
            language=entry.get('lang'),
        )
    ]
    cut.custom = {key: value for key, value in entry.items() if key not in TAKEN} or None
    return cut


class ShardMaker:
    """Writes shards into folders of their own.

    Args:
        folder: for these.
        plan: what they are made of.
        stop: whether bad audio is an error.
    """

    def __init__(self, folder: Path, plan: Plan, stop: bool):
        self.folder, self.plan, self.stop = folder, plan, stop

    def __call__(self, shard: Shard) -> None:
        """Write a shard, read it back, and put its folder in place.

        Raises:
            BadAudioError: naming the file, if bad audio is an error.
            ValueError: if what is read back is not what was written.
        """
        torch.set_num_threads(1)
        target = self.folder / f'{shard.number:06d}'
        partial = target.with_suffix('.partial')
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        report, durations = ShardReport(shard.number), {}
        fields = {'recording': self.plan.format}
        with SharWriter(partial, fields, shard_size=None, shard_suffix=f'.{shard.number:06d}') as writer:
            for number, line in enumerate(shard.lines, start=shard.number * self.plan.shard_size):
                cut = self._sound_cut(line, number, report)
                if cut is not None:
                    writer.write(cut)
                    durations[cut.id] = cut.duration
        check_written(partial, shard.number, durations)
        report.utterances, report.seconds = len(durations), round(sum(durations.values()), 3)
        report.files = {path.name: digest_of(path) for path in sorted(partial.iterdir())}
        write_text(partial / 'report.json', json.dumps(asdict(report)) + '\n')
        partial.rename(target)

    def _sound_cut(self, line: Line, number: int, report: ShardReport) -> MonoCut | None:
        try:
            cut = cut_of(line, number)
            if self.plan.sample_rate:
                cut = cut.resample(self.plan.sample_rate)
            samples = torch.from_numpy(cut.load_audio())
            if not samples.numel() or not samples_are_valid(samples):
                raise BadAudioError("it has samples that are NaN or infinite" if samples.numel() else "it is empty")
            return cut
        except Exception as error:  # soundfile, lhotse and its backends each have their own
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
            bad = {'manifest': line.manifest, 'line': line.number, 'reason': reason}
            bad['file'] = audio_of(line.entry)
            if self.stop:
                raise BadAudioError(f"{bad['manifest']}, line {bad['line']}: {bad['file']}: {reason}") from None
            report.bad.append(bad)
        return None


def check_written(folder: Path, number: int, durations: dict[str, float]) -> None:
    """Read a shard back; raise ValueError, naming the first difference, unless it has what was written."""
    fields = {'cuts': [f'{folder}/cuts.{number:06d}.jsonl.gz'], 'recording': [f'{folder}/recording.{number:06d}.tar']}
    found = {}
    for cut in CutSet.from_shar(fields=fields) if durations else ():
        found[cut.id] = cut.load_audio().shape[-1] / cut.sampling_rate
    for name, duration in durations.items():
        if name not in found or abs(found[name] - duration) > TOLERANCE:
            raise ValueError(f"shard {number}: {name} has {duration} s, and {found.get(name)} when it is read back")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def divide(lines: list[Line], plan: Plan) -> list[Shard]:
    """Divide the entries of the manifests into shards, in their order or shuffled."""
    if plan.shuffle is not None:
        random.Random(plan.shuffle).shuffle(lines)
    return [
        Shard(number, lines[start : start + plan.shard_size])
        for number, start in enumerate(range(0, len(lines), plan.shard_size))
    ]


def kept(plan: Plan) -> list[Line]:
    """Read the manifests; entries that are too short or too long are left out.

    Raises:
        ValueError: naming the manifest and line that cannot be read, or if nothing is left.
    """
    lines = [
        line
        for manifest in plan.manifests
        for line in read_entries(manifest)
        if plan.min_duration <= (line.entry.get('duration') or plan.min_duration) <= plan.max_duration
    ]
    if not lines:
        raise ValueError(f"--manifest: nothing is left of {', '.join(plan.manifests)}")
    return lines


def audio_of(entry: dict) -> str:
    """Return the audio file of an entry, under either of NeMo's names; '' where it has none."""
    return entry.get('audio_filepath', entry.get('audio_filename', ''))


def make_shards(shards: list[Shard], maker: ShardMaker, workers: int) -> list[ShardReport]:
    """Make the missing shards, with a progress bar; returns the reports of all."""
    missing = [shard for shard in shards if not (maker.folder / f'{shard.number:06d}' / 'report.json').exists()]
    whole = sum(len(shard.lines) for shard in shards)
    done = whole - sum(len(shard.lines) for shard in missing)
    with tqdm(total=whole, initial=done, desc='packing', unit='utterance') as progress:
        for shard in _finished(missing, maker, workers):
            progress.update(len(shard.lines))
    return [read_report(maker.folder / f'{shard.number:06d}') for shard in shards]


def _finished(shards: list[Shard], maker: ShardMaker, workers: int) -> Iterator[Shard]:
    if workers <= 1:
        for shard in shards:
            maker(shard)
            yield shard
        return
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context('fork' if os.name == 'posix' else 'spawn')
    ) as pool:
        futures = {pool.submit(maker, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                future.result()  # raises what the process did
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_report(folder: Path) -> ShardReport:
    """Return the report of a shard that is whole."""
    return ShardReport(**json.loads((folder / 'report.json').read_text()))


def put_together(output: Path, parts: Path, reports: list[ShardReport]) -> None:
    """Move the files of all shards into one folder, and that into place; an interrupted run continues."""
    gathered = output / '.shar'
    gathered.mkdir(exist_ok=True)
    for report in reports:
        for name in report.files if report.utterances else ():
            source = parts / f'{report.number:06d}' / name
            if source.exists():
                os.replace(source, gathered / name)
    sums = [
        f'{digest}  shar/{name}\n' for report in reports if report.utterances for name, digest in report.files.items()
    ]
    write_text(output / 'SHA256SUMS', ''.join(sums))
    write_text(output / 'report.json', json.dumps(summary(reports), indent=1) + '\n')
    gathered.rename(output / 'shar')
    shutil.rmtree(parts)


def summary(reports: list[ShardReport]) -> dict:
    """Return what all shards have together."""
    return {
        'shards': sum(report.utterances > 0 for report in reports),
        'utterances': sum(report.utterances for report in reports),
        'hours': round(sum(report.seconds for report in reports) / 3600, 4),
        'bad': [bad for report in reports for bad in report.bad],
    }


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding='utf-8')


def pack(plan: Plan, output: Path, stop: bool = False, workers: int = 1) -> None:
    """Pack the utterances of a plan into ``output/shar``; continues where an interrupted call ended.

    Args:
        plan: what the shards are made of.
        output: the folder to make.
        stop: whether bad audio is an error.
        workers: processes.

    Raises:
        ValueError: if the folder is one of another plan, all audio is bad, or bad audio is an error.
    """
    plan.claim(output)
    if not (output / 'shar').exists():
        maker = ShardMaker(output / '.parts', plan, stop)
        reports = make_shards(divide(kept(plan), plan), maker, workers)
        if not any(report.utterances for report in reports):
            raise ValueError(f"--manifest: all audio is bad; the first: {reports[0].bad[0]}")
        put_together(output, maker.folder, reports)
    shutil.rmtree(output / '.parts', ignore_errors=True)  # of one that was killed at its very end
