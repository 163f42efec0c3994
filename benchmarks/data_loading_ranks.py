# SPDX-License-Identifier: Apache-2.0
"""How much each rank reads of data that lhotse reads, and how long a resume takes.

    python benchmarks/data_loading_ranks.py [--quick]

*Cuts read per cut trained on* is measured over whole segments of each simulated rank, for lhotse Shar with at least one shard
per rank, and for one manifest. *Resume* is the CPU time from the creation of the loader to its first batch, after one rank
has trained on 100,000 utterances of 0.1 s, with half of a segment of 10,000 to skip.
"""

import argparse
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
from measure import Quick
from omegaconf import OmegaConf

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

RATE = 16000


def write_corpus(folder: Path, shards: int, utterances: int) -> None:
    """Write a manifest, and so many shards of so many utterances, which are one file."""
    soundfile.write(folder / 'audio.wav', np.random.default_rng(0).normal(0, 0.1, RATE // 10), RATE)
    row = json.dumps({'audio_filepath': str(folder / 'audio.wav'), 'duration': 0.1, 'sampling_rate': RATE, 'text': ''})
    (folder / 'manifest.json').write_text((row + '\n') * (shards * utterances))
    recording = Recording.from_file(folder / 'audio.wav')
    cuts = CutSet.from_cuts(recording.to_cut().with_id(f'cut-{number}') for number in range(utterances))
    (folder / 'shar').mkdir()
    cuts.to_shar(folder / 'shar', fields={'recording': 'wav'}, shard_size=utterances)
    for name in ('cuts.000000.jsonl.gz', 'recording.000000.tar'):
        for shard in range(1, shards):
            shutil.copy(folder / 'shar' / name, folder / 'shar' / name.replace('000000', f'{shard:06d}'))


def loader(data: dict, rank: int = 0, ranks: int = 1, buffer: int = 100):
    """Return the loader of a rank, made by the patched model's own code without a model."""
    model = object.__new__(
        type('Model', (EncDecDenoiseMaskedTokenPredModel,), {'global_rank': rank, '_trainer': None})
    )
    model.__dict__.update(world_size=ranks, _cfg=OmegaConf.create({'sample_rate': RATE}))
    section = {'use_lhotse': True, 'sample_rate': RATE, 'batch_size': 20, 'shuffle': True, 'num_workers': 0, **data}
    section |= {'shuffle_buffer_size': buffer, 'resumable': {'seed': 0}, 'noise_manifest': None}
    return model._setup_dataloader_from_config(OmegaConf.create(section))


class Counted:
    """Counts the items that iterators of a class give."""

    def __init__(self, cls: type):
        self.items, self._cls, self._read = 0, cls, cls.__iter__

    def __enter__(self):
        def count(iterator):
            for item in self._read(iterator):
                self.items += 1
                yield item

        self._cls.__iter__ = count
        return self

    def __exit__(self, *error):
        self._cls.__iter__ = self._read


def main(argv=None) -> int:
    """Measure and print a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 8, 64], help='numbers of ranks to simulate')
    parser.add_argument(
        '--behind', type=int, default=100_000, help='utterances that a rank has trained on before it resumes'
    )
    parser.add_argument('--utterances', type=int, default=1000, help='utterances in a shard')
    parser.add_argument('--segment', type=int, default=10_000, help='utterances in a segment of the resume')
    small = dict(ranks=[1, 2], behind=200, utterances=100, segment=100)
    parser.add_argument('--quick', action=Quick, small=small)
    options = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory() as name,
        Counted(LazySharIterator) as shar,
        Counted(LazyNeMoIterator) as manifest,
    ):
        counted, folder = {'Shar': shar, 'manifest': manifest}, Path(name)
        write_corpus(folder, max(*options.ranks, options.behind // options.utterances) + 4, options.utterances)
        data = {
            'Shar': {'shar_path': str(folder / 'shar')},
            'manifest': {'manifest_filepath': str(folder / 'manifest.json')},
        }
        print(
            '| data | '
            + ' | '.join(f'{ranks} ranks' for ranks in options.ranks)
            + ' | resume, s of CPU |\n| --- |'
            + ' ---: |' * (1 + len(options.ranks))
        )
        for kind, section in data.items():
            shares = []
            for ranks in options.ranks:
                counted[kind].items = trained = 0
                for rank in range(ranks):
                    batches = iter(loader(section, rank, ranks))
                    trained += sum(len(next(batches).audio) for _ in range(10))
                shares.append(f'{counted[kind].items / trained:.2f}')
            state = loader(section, buffer=options.segment).state_dict()
            unit = (0, 0, options.behind // options.utterances, 0) if kind == 'Shar' else (0, 0, 0, options.behind)
            state['places'] = {0: {0: ((unit,), 100)}}
            start = time.process_time()
            resumed = loader(section, buffer=options.segment)
            resumed.load_state_dict(state)
            next(iter(resumed))
            print(f'| {kind} | {" | ".join(shares)} | {time.process_time() - start:.1f} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
