# SPDX-License-Identifier: Apache-2.0
r"""Pack the speech of NeMo manifests into shards (lhotse Shar), which disks and networks read fast.

    python prepare_shards.py --manifest train_manifest.json --output shards/train --workers 8
    python prepare_shards.py --manifest noise_manifest.json --output shards/noise
    python pretrain.py --config-name=nest_fast-conformer_streaming_lhotse \\
        model.train_ds.shar_path=shards/train/shar model.train_ds.noise_manifest=shards/noise/shar ...

A shard is a tar file of recordings and a manifest of their cuts. When all shards are complete, OUTPUT contains ``shar``, the
folder of the shards, ``SHA256SUMS`` (run ``sha256sum -c SHA256SUMS`` in OUTPUT to check them) and ``report.json``, with
the numbers of utterances and seconds, and every bad file with the reason. A file is bad if it cannot be read, has no
samples, NaN or infinite samples, or less than half of the duration in the manifest. Bad files are left out; with
``--bad_audio stop`` the first one ends the command.

If you interrupt the command, run it again: complete shards are kept. Each shard is read back when it is written, and its
utterances and durations are compared with the manifest. Other fields of the manifest (text, speaker, language) are kept.
"""

from script_tools import report_error, require_patches

require_patches(__file__)

import argparse
import json
import sys
from pathlib import Path

from nemo.collections.asr.data.shard_writer import Plan, digest_of, pack
from nemo.collections.asr.parts.utils.manifest_index import expanded
from nemo.utils.left_out import LEFT_OUT

FORMATS = ('flac', 'wav', 'opus', 'original')


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--manifest', nargs='+', required=True, help='one or more NeMo manifests, or patterns of them')
    parser.add_argument('--output', type=Path, required=True, help='the folder to make')
    parser.add_argument('--shard_size', type=int, default=1000, help='utterances in a shard (default: 1000)')
    parser.add_argument('--format', choices=FORMATS, default='flac', help='format of the recordings (default: flac)')
    parser.add_argument('--sample_rate', type=int, help='rate in Hz to resample to (default: no resampling)')
    parser.add_argument('--min_duration', type=float, default=0.0, help='leave out shorter utterances, in seconds')
    parser.add_argument(
        '--max_duration', type=float, default=float('inf'), help='leave out longer utterances, in seconds'
    )
    parser.add_argument('--shuffle', type=int, metavar='SEED', help='shuffle the utterances with this seed')
    parser.add_argument(
        '--bad_audio',
        choices=('skip', 'stop'),
        default='skip',
        help='leave bad files out, or end at the first (default: skip)',
    )
    parser.add_argument('--workers', type=int, default=1, help='processes (default: 1)')
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Pack by the command line; return the exit status."""
    options = arguments(argv)
    try:
        for name in ('shard_size', 'workers'):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
        manifests = [
            str(Path(path).expanduser().resolve()) for pattern in options.manifest for path in expanded(pattern)
        ]
        for path in manifests:
            if not Path(path).is_file():
                raise ValueError(f"--manifest: no file {path}")
        taken = {name: getattr(options, name) for name in Plan.__dataclass_fields__ if hasattr(options, name)}
        plan = Plan(manifests=manifests, digests=[digest_of(Path(path)) for path in manifests], **taken)
        pack(plan, options.output, options.bad_audio == 'stop', options.workers)
    except (ValueError, OSError) as error:
        return report_error(__file__, error)
    found = json.loads((options.output / 'report.json').read_text())
    for bad in found['bad']:
        print(f"bad audio: {bad['manifest']}, line {bad['line']}: {bad['file']}: {bad['reason']}")
    if LEFT_OUT.total():
        print(LEFT_OUT.summary())
    print(
        f"{found['utterances']} utterances, {found['hours']:.2f} h, in {found['shards']} shards; {len(found['bad'])} bad "
        f"ones left out. Train with use_lhotse=true and shar_path={options.output / 'shar'}"
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
