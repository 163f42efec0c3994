# SPDX-License-Identifier: Apache-2.0
r"""Draw masks, attention windows and learning curves, as PNG and SVG.

    python plot_contexts.py --model model.nemo --audio speech.wav --output pictures
    python plot_contexts.py --config ../conf/ssl/nest/nest_hierarchical_streaming.yaml --audio speech.wav \
        --context 80 --frame 100 --output pictures
    python plot_contexts.py --logs experiments/run --output pictures

With a model or a config and an audio file:

- masked_spectrogram: the features with their masked blocks, and which attention frames are masked; of a model that
  predicts masked tokens
- attention_windows: what one frame attends to in each layer, and what its output depends on through all layers

It also prints an audit of the masking over --draws draws: the masked share, the length of masked runs, and the share
without a visible frame. With a config the weights are random; no picture depends on them.

With the logs of a training run (a folder with TensorBoard's event files):

- learning_curves: loss and accuracy in each context and of each horizon, and the curriculum's ceiling

Exit status: 0; 2 if something given cannot be used.
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

import torch
from script_tools import context_option, report_error, require_patches, restore, sample_rate_of


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, help='a .nemo file')
    parser.add_argument(
        '--config', type=Path, help='or a training config (yaml), in the folder of the configs that it inherits'
    )
    parser.add_argument('--audio', type=Path, help='an audio file')
    parser.add_argument('--logs', type=Path, help='folder of a training run')
    parser.add_argument('--output', type=Path, required=True, help='folder for the pictures')
    parser.add_argument(
        '--context', type=context_option, help='such as "[40,0]", 40 or low (the default of the model)'
    )
    parser.add_argument(
        '--frame', type=int, help='attention frame whose windows to draw (at three quarters of the audio)'
    )
    parser.add_argument('--frames', type=int, help='length of the axis in attention frames (that of the audio)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the masks (0)')
    parser.add_argument('--draws', type=int, default=100, help='draws of the audit (100)')
    options = parser.parse_args(argv)
    models = [given for given in (options.model, options.config) if given is not None]
    if len(models) > 1 or bool(models) != (options.audio is not None):
        parser.error('--audio goes with --model or --config, one of them')
    if not models and options.logs is None:
        parser.error('nothing to draw: give --model or --config with --audio, or --logs')
    for name, least in {'frames': 1, 'draws': 1, 'seed': 0}.items():
        if getattr(options, name) is not None and getattr(options, name) < least:
            parser.error(f'--{name} is {getattr(options, name)}; it must be {least} or more')
    return options


def model_of_config(path: Path):
    """Build the model of a training config, with random weights and without data; in eval mode.

    Raises:
        ValueError: naming the config, if that fails.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf, open_dict

    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
    from nemo.utils import logging

    if not path.is_file():
        raise ValueError(f'--config {path}: there is no such file')
    logging.setLevel(logging.ERROR)
    try:
        with initialize_config_dir(str(path.resolve().parent), version_base=None):
            cfg = compose(path.stem)
        with open_dict(cfg):
            cfg.model.train_ds = cfg.model.validation_ds = cfg.model.test_ds = None
            normalize = cfg.model.preprocessor.get('normalize')
            if isinstance(normalize, str) and normalize.endswith(('.yaml', '.yml')):
                cfg.model.preprocessor.normalize = 'NA'  # statistics of a corpus: the picture does without
        OmegaConf.resolve(cfg.model)
        return EncDecDenoiseMaskedTokenPredModel(cfg.model).eval()
    except Exception as error:  # whatever Hydra, OmegaConf and the model's classes raise
        raise ValueError(f'--config {path}: no model can be built of it: {error}') from error


def draw_model(model, audio: Path, options: argparse.Namespace) -> dict:
    """Return the pictures of a model by name, and print the audit of its masking, if it masks.

    Raises:
        ValueError: if the audio or the context cannot be used.
    """
    from nemo.collections.asr.data.audio_files import read_audio
    from nemo.collections.asr.parts.objectives.base import BatchInputs
    from nemo.collections.asr.parts.ssl_reports import figures
    from nemo.collections.asr.parts.ssl_reports.validation import FixedMasks, parse_contexts, utterance_seeds

    if not hasattr(model, 'objectives'):
        raise ValueError(f'{type(model).__name__} predicts neither masked nor next tokens')
    context = list(model.encoder.att_context_size)
    if options.context is not None:
        (context,) = parse_contexts([options.context], model.encoder, '--context')
    samples = torch.from_numpy(read_audio(audio, sample_rate_of(model))).unsqueeze(0)
    lengths = torch.tensor([samples.shape[1]])
    with torch.inference_mode(), model.encoder.using_att_context_size(context):
        features = model.preprocessor(input_signal=samples, length=lengths)
        seeds = utterance_seeds(samples, lengths, options.seed)
        masking = FixedMasks(model.mask_processor, seeds, model.encoder.tightest_window())
        record = model.encode(BatchInputs(features, features), masking if model.objectives.masks else None)
        windows = figures.attention_windows(model, options.frames or int(record.encoded_lengths[0]), options.frame)
        if not model.objectives.masks:
            return {'attention_windows': windows}
        print(audit_text(model, record, context, options))
        masked = figures.masked_spectrogram(model, record, f'{audio.name}, masked for context {context}')
        return {'masked_spectrogram': masked, 'attention_windows': windows}


def audit_text(model, record, context, options: argparse.Namespace) -> str:
    """Return an audit of the masking in an utterance of the record's length, as text."""
    from nemo.collections.asr.parts.ssl_reports.audit import audit_masking, windows_of
    from nemo.collections.asr.parts.ssl_reports.figures import look_ahead_title

    utterance = record.mask_lengths, record.masks.shape[1], record.factor
    windows = windows_of(model.encoder)
    audit = audit_masking(model.mask_processor, *utterance, windows, options.draws, options.seed)
    lines = [
        f'audit of {options.draws} draws in context {look_ahead_title(model, context)}:',
        f'  masked: {audit.masked_share():.1%} of the mask frames, {audit.frames_masked} of {audit.frames} attention frames',
        f'  masked runs, in attention frames: mean {audit.mean_run():.1f}, 90 % up to {audit.run_quantile(0.9):g}, '
        f'longest {audit.run_quantile(1.0):g}',
    ]
    for share, group in groupby(audit.no_visible_frame_share().items(), key=lambda item: f'{item[1]:.1%}'):
        names = [name for name, _ in group]
        within = ' to '.join(dict.fromkeys((names[0], names[-1])))
        lines.append(f'  no visible frame in {within}: {share} of the masked attention frames')
    return '\n'.join(lines)


def main(argv=None) -> int:
    """Draw and write; return the exit status."""
    options = arguments(argv)
    require_patches(__file__)
    from nemo.collections.asr.parts.ssl_reports.figures import learning_curves, read_curves, save_figure

    try:
        pictures = {}
        if options.logs is not None:
            pictures['learning_curves'] = learning_curves(read_curves(options.logs))
        if options.audio is not None:
            model = model_of_config(options.config) if options.config else restore(options.model, 'cpu')
            pictures.update(draw_model(model, options.audio, options))
        options.output.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            for file in save_figure(figure, options.output / name):
                print(file)
    except (ValueError, OSError) as error:
        return report_error(__file__, error)
    return 0


if __name__ == '__main__':
    sys.exit(main())
