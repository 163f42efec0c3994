# SPDX-License-Identifier: Apache-2.0
"""Pack utterances into shards with lhotse's writer, in several processes. New in this project."""

import hashlib
import itertools
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.shar import SharWriter
from tqdm import tqdm

from nemo.collections.asr.data.audio_files import entries_within
from nemo.collections.asr.data.loader_workers import in_order
from nemo.collections.asr.data.ssl_dataset import BadAudioError
from nemo.collections.asr.parts.utils.manifest_index import Line, read_entries
from nemo.collections.asr.parts.utils.nonfinite_guard import fault_of
from nemo.collections.common.data.lhotse.nemo_adapters import holds
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.atomic_files import write_text

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
        """Make a folder one of this plan; raise ValueError with the first difference if it is one of another."""
        path = folder / 'plan.json'
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, json.dumps(asdict(self), indent=1) + '\n')
        found = json.loads(path.read_text())
        for name, value in asdict(self).items():
            if found.get(name) != value:
                raise ValueError(f"--output {folder} has {name} {found.get(name)}, not {value}; take another folder")


def cut_of(line: Line, number: int, sample_rate: int | None) -> MonoCut:
    """Return an entry's cut, named by file and number; BadAudioError for what a shard must not have."""
    entry = line.entry
    path = get_full_path(line.audio, manifest_file=line.manifest)
    name = f'{Path(path).stem}-{number}'
    recording = Recording.from_file(path, recording_id=name)
    offset, duration = entry.get('offset') or 0.0, entry.get('duration')
    if not holds(recording, offset, duration):
        raise BadAudioError(f"it lasts {recording.duration:.2f} s, in the manifest {duration} s from {offset} s on")
    left = recording.duration - offset
    cut = recording.to_cut().truncate(offset=offset, duration=min(duration or left, left))
    cut = cut.resample(sample_rate or cut.sampling_rate).with_id(name)
    if fault := fault_of(torch.from_numpy(cut.load_audio())):
        raise BadAudioError(fault)
    fields = {'text': entry.get('text'), 'speaker': entry.get('speaker'), 'language': entry.get('lang')}
    cut.supervisions = [SupervisionSegment(name, name, start=0.0, duration=cut.duration, **fields)]
    cut.custom = {key: value for key, value in entry.items() if key not in TAKEN} or None
    return cut


class ShardMaker(torch.utils.data.Dataset):
    """Item n writes shard n and its report, if missing; it is the report, or an error message."""

    def __init__(self, output: Path, plan: Plan, stop: bool):
        self.shards, self.reports = output / '.shar', output / '.reports'
        self.plan, self.stop = plan, stop
        lines = itertools.chain.from_iterable(map(read_entries, plan.manifests))
        self.lines = list(entries_within(lines, plan.min_duration, plan.max_duration))
        if not self.lines:
            raise ValueError(f"--manifest: nothing is left of {', '.join(plan.manifests)}")
        if plan.shuffle is not None:
            random.Random(plan.shuffle).shuffle(self.lines)
        for folder in (self.shards, self.reports):
            folder.mkdir(exist_ok=True)

    def __len__(self) -> int:
        return -(-len(self.lines) // self.plan.shard_size)

    def __getitem__(self, number: int) -> dict | str:
        path = self.reports / f'{number:06d}.json'
        try:
            if not path.exists():
                write_text(path, json.dumps(self._write(number)))
            return json.loads(path.read_text())
        except (ValueError, OSError) as error:  # a DataLoader would add a worker's traceback to it
            return str(error)

    def _write(self, number: int) -> dict:
        """Write a shard, read it back, and return its report."""
        durations: dict[str, float] = {}
        bad: list[dict] = []
        first = number * self.plan.shard_size
        fields = {'recording': self.plan.format}
        with SharWriter(self.shards, fields, shard_size=None, shard_suffix=f'.{number:06d}') as writer:
            for place, line in enumerate(self.lines[first : first + self.plan.shard_size], start=first):
                try:
                    cut = cut_of(line, place, self.plan.sample_rate)
                except Exception as error:  # soundfile, lhotse and its backends each have their own
                    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
                    if self.stop:
                        raise BadAudioError(f"{line.place}: {line.audio}: {reason}") from None
                    bad.append({'manifest': line.manifest, 'line': line.number, 'reason': reason, 'file': line.audio})
                else:
                    writer.write(cut)
                    durations[cut.id] = cut.duration
        files = sorted(self.shards.glob(f'*.{number:06d}.*'))
        if durations:
            check_written(self.shards, number, durations)
        while not durations and files:
            files.pop().unlink()
        sums = {path.name: digest_of(path) for path in files}
        return {'utterances': len(durations), 'seconds': sum(durations.values()), 'bad': bad, 'files': sums}


def check_written(folder: Path, number: int, durations: dict[str, float]) -> None:
    """Read a shard back; raise ValueError, naming the first difference, unless it has what was written."""
    fields = {'cuts': [f'{folder}/cuts.{number:06d}.jsonl.gz'], 'recording': [f'{folder}/recording.{number:06d}.tar']}
    cuts = CutSet.from_shar(fields=fields)
    found = {cut.id: cut.load_audio().shape[-1] / cut.sampling_rate for cut in cuts}
    for name, duration in durations.items():
        if name not in found or abs(found[name] - duration) > TOLERANCE:
            raise ValueError(f"shard {number}: {name} has {duration} s, and {found.get(name)} when it is read back")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def pack(plan: Plan, output: Path, stop: bool = False, workers: int = 1) -> None:
    """Pack the utterances of a plan into ``output/shar`` in processes, or continue an interrupted call.

    ValueError if the folder is one of another plan, all audio is bad, or bad audio is an error (``stop``).
    """
    plan.claim(output)
    if not (output / 'shar').exists():
        maker = ShardMaker(output, plan, stop)
        made = in_order(maker, workers if workers > 1 else 0)
        reports = list(tqdm(made, total=len(maker), desc='packing', unit='shard'))
        summary = {
            'shards': sum(report['utterances'] > 0 for report in reports),
            'utterances': sum(report['utterances'] for report in reports),
            'hours': round(sum(report['seconds'] for report in reports) / 3600, 4),
            'bad': [bad for report in reports for bad in report['bad']],
        }
        if not summary['utterances']:
            raise ValueError(f"--manifest: all audio is bad; the first: {summary['bad'][0]}")
        sums = {name: digest for report in reports for name, digest in report['files'].items()}
        write_text(output / 'SHA256SUMS', ''.join(f'{digest}  shar/{name}\n' for name, digest in sums.items()))
        write_text(output / 'report.json', json.dumps(summary, indent=1) + '\n')
        maker.shards.rename(output / 'shar')
    shutil.rmtree(output / '.reports', ignore_errors=True)  # also of one that was killed at its very end
