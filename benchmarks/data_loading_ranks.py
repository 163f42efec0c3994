# SPDX-License-Identifier: Apache-2.0
"""How much each rank reads of data that lhotse reads, and how long a resume takes.

    python benchmarks/data_loading_ranks.py

*Cuts read per cut trained on* is over whole segments of each of so many simulated ranks, of lhotse Shar with a shard for
each rank or more, and of one manifest. *Resume* is the CPU time from the making of the loader to its first batch, behind 100,000
utterances of 0.1 s that one rank has trained on, with half of a segment of 10,000 to skip.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet, Recording
from lhotse.shar.readers.lazy import LazySharIterator
from omegaconf import OmegaConf

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

RATE, SHARD, SHARDS, BEHIND = 16000, 1000, 104, 100_000
RANKS = 1, 8, 64


def write_corpus(folder: Path) -> None:
    """Write a manifest and shards whose utterances are one file."""
    soundfile.write(folder / 'audio.wav', np.random.default_rng(0).normal(0, 0.1, RATE // 10), RATE)
    row = json.dumps({'audio_filepath': str(folder / 'audio.wav'), 'duration': 0.1, 'sampling_rate': RATE, 'text': ''})
    (folder / 'manifest.json').write_text((row + '\n') * (SHARD * SHARDS))
    recording = Recording.from_file(folder / 'audio.wav')
    cuts = CutSet.from_cuts(recording.to_cut().with_id(f'cut-{number}') for number in range(SHARD))
    (folder / 'shar').mkdir()
    cuts.to_shar(folder / 'shar', fields={'recording': 'wav'}, shard_size=SHARD)
    for name in ('cuts.000000.jsonl.gz', 'recording.000000.tar'):
        for shard in range(1, SHARDS):
            shutil.copy(folder / 'shar' / name, folder / 'shar' / name.replace('000000', f'{shard:06d}'))


def loader(data: dict, rank: int = 0, ranks: int = 1, buffer: int = 10_000):
    """Return the loader of a rank, made by the patched model's own code without a model."""
    model = object.__new__(type('Model', (EncDecDenoiseMaskedTokenPredModel,), {'global_rank': rank}))
    model.__dict__.update(world_size=ranks, _cfg=OmegaConf.create({'sample_rate': RATE}))
    section = {'use_lhotse': True, 'sample_rate': RATE, 'batch_size': 20, 'shuffle': True, 'num_workers': 0, **data}
    section |= {'shuffle_buffer_size': buffer, 'resumable': {'seed': 0}, 'noise_manifest': None}
    return model._setup_dataloader_from_config(OmegaConf.create(section))


class Counted:
    """Counts the items that iterators of a class give."""

    def __init__(self, cls: type):
        self.items, read = 0, cls.__iter__

        def count(iterator):
            for item in read(iterator):
                self.items += 1
                yield item

        cls.__iter__ = count


def main() -> int:
    """Measure and print a table; returns the exit status."""
    counted = {'Shar': Counted(LazySharIterator), 'manifest': Counted(LazyNeMoIterator)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        data = {
            'Shar': {'shar_path': str(folder / 'shar')},
            'manifest': {'manifest_filepath': str(folder / 'manifest.json')},
        }
        print(
            '| data | '
            + ' | '.join(f'{ranks} ranks' for ranks in RANKS)
            + ' | resume, s of CPU |\n| --- |'
            + ' ---: |' * 4
        )
        for kind, section in data.items():
            shares = []
            for ranks in RANKS:
                counted[kind].items = trained = 0
                for rank in range(ranks):
                    batches = iter(loader(section, rank, ranks, buffer=100))
                    trained += sum(len(next(batches).audio) for _ in range(10))
                shares.append(f'{counted[kind].items / trained:.2f}')
            state = loader(section).state_dict()
            unit = (0, 0, BEHIND // SHARD, 0) if kind == 'Shar' else (0, 0, 0, BEHIND)
            state['places'] = {0: {0: ((unit,), 100)}}
            start = time.process_time()
            resumed = loader(section)
            resumed.load_state_dict(state)
            next(iter(resumed))
            print(f'| {kind} | {" | ".join(shares)} | {time.process_time() - start:.1f} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
