# SPDX-License-Identifier: Apache-2.0
"""Audit the masks of the shipped configs in each of their contexts, offline and in live streams.

    python benchmarks/masking_audit.py [--utterances 480] [--seconds 16] [--json shares.json]

Prints the share of masked frames, offline and in a stream with steps of one chunk (80 ms without chunks), and the share of
masked frames without a visible frame in a layer's window.
"""

import argparse
import json
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from measure import Quick
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.audit import MaskAudit, audit_masking, audit_masks, windows_of
from nemo_streaming_ssl.report import require_active

CONFIGS = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest'
FRAMES_PER_SECOND = 100
SMALL = ('d_model=16', 'n_heads=2', 'subsampling_conv_channels=8')  # masking does not depend on the width


def load(name: str):
    """Return the encoder of a config in a small width, and its masking."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(name, overrides=[f'model.encoder.{change}' for change in SMALL])
    cfg.model.train_ds = cfg.model.validation_ds = None
    OmegaConf.resolve(cfg)
    encoder, masking = instantiate(cfg.model.encoder).eval(), instantiate(cfg.model.masking)
    masking.subsampling_factor = encoder.subsampling_factor
    return encoder, masking


def audit_live(masking, window: Window, windows: dict, utterances: int, frames: int) -> MaskAudit:
    """Count what streams hide that come in steps of one chunk."""
    factor = masking.subsampling_factor
    window = masking.within(window)
    line, masks = masking.new_stream(utterances), []
    for start in range(0, frames, window.chunk * factor):
        masks.append(masking.draw_on(line, min(window.chunk * factor, frames - start), window))
    return audit_masks(torch.cat(masks, dim=1), torch.full((utterances,), frames), factor, windows)


def rows_of(name: str, options: argparse.Namespace) -> list[dict]:
    """Return a row for each context of a config."""
    encoder, masking = load(name)
    frames, rows = int(options.seconds * FRAMES_PER_SECOND), []
    torch.manual_seed(options.seed)
    for context in encoder.att_context_size_all:
        with encoder.using_att_context_size(context):
            windows, window = windows_of(encoder), encoder.tightest_window()
        layers = {found: window for found, window in windows.items() if found != 'stack'}
        lengths = torch.full((options.utterances,), frames)
        offline = audit_masking(masking, lengths, 1, masking.subsampling_factor, layers, draws=1, seed=options.seed)
        live = audit_live(masking, window, layers, options.utterances, frames)
        rows.append(
            {
                'config': name,
                'context': list(context),
                'masked': offline.masked_share().item(),
                'masked_live': live.masked_share().item(),
                'masked_frames': int(offline.frames_masked),
                'no_visible_frame': int(max(offline.no_visible_frame.values())),
                'no_visible_frame_live': int(max(live.no_visible_frame.values())),
                'mean_run': offline.mean_run().item(),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    lines = [
        '| config | context | masked | masked live | mean run (frames) | no visible frame | no visible frame live |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        left, right = row['context']
        lines.append(
            f"| `{row['config']}` | {left}, {right} | {row['masked']:.1%} | {row['masked_live']:.1%} | "
            f"{row['mean_run']:.1f} | {row['no_visible_frame']} of {row['masked_frames']} | {row['no_visible_frame_live']} |"
        )
    return '\n'.join(lines)


def arguments(args=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--utterances', type=int, default=480, help='utterances for each config and context')
    parser.add_argument('--seconds', type=float, default=16.0, help='length of an utterance')
    parser.add_argument('--seed', type=int, default=0, help='seed of the masks')
    parser.add_argument('--configs', nargs='*', help='names of configs (all that are shipped)')
    parser.add_argument('--json', type=Path, help='JSON file for the figures')
    parser.add_argument(
        '--quick', action=Quick, small=dict(utterances=4, seconds=4.0, configs=['nest_fast-conformer_streaming_tiny'])
    )
    return parser.parse_args(args)


def main(args=None) -> list[dict]:
    """Audit the configs, print the table, and return its rows."""
    require_active()
    options = arguments(args)
    names = options.configs or sorted(path.stem for path in CONFIGS.glob('*.yaml'))
    rows = [row for name in tqdm(names, desc='auditing', unit='config') for row in rows_of(name, options)]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + '\n')
    return rows


if __name__ == '__main__':
    main()
