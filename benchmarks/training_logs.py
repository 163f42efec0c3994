# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of the logs and audits of a training step, as a share of the step.

    python benchmarks/training_logs.py                    # 4 x 16 s, 16 layers of 176, 8192 classes
    python benchmarks/training_logs.py --layers 4 --d-model 96 --steps 5

Each step is timed in two parts, one right after the other: masking, forward, backward and optimizer; and what it then
computes for the logger. A share is the median of the second over the median of the first. Steps with an audit are
those that the config's interval picks; here every second step is one.
"""

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from measure import Quick, wait_for_device
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

CONFIGS = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest'
INTERVAL = 100  # batches from one audit to the next, as in the streaming configs
SAMPLE_RATE = 16000


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--config', default='nest_hierarchical_streaming', help='in examples/asr/conf/ssl/nest')
    parser.add_argument('--layers', type=int, default=16)
    parser.add_argument('--d-model', type=int, default=176)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--seconds', type=float, default=16.0, help='seconds of audio in each utterance')
    parser.add_argument('--steps', type=int, default=20, help='timed steps')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--quick', action=Quick, small=dict(layers=4, d_model=32, batch_size=1, seconds=2.0, steps=2))
    return parser.parse_args(argv)


def make_model(options: argparse.Namespace) -> EncDecDenoiseMaskedTokenPredModel:
    """Return a model of a streaming config in another size, with a context for each third of its layers."""
    thirds = [[index * options.layers // 3, [left, 0]] for index, left in enumerate((40, 120, 320))]
    overrides = [f'model.encoder.n_layers={options.layers}', f'model.encoder.d_model={options.d_model}']
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(options.config, overrides=overrides)
    cfg.model.encoder.layer_att_context_size = thirds
    del cfg.model.train_ds, cfg.model.validation_ds
    OmegaConf.resolve(cfg)
    torch.manual_seed(0)
    model = EncDecDenoiseMaskedTokenPredModel(cfg.model).to(options.device).train()
    model.reports.audit_every_n_batches = 2
    return model


def make_batch(options: argparse.Namespace) -> AudioNoiseBatch:
    """Return a batch of noise."""
    samples = int(options.seconds * SAMPLE_RATE)
    audio = torch.randn(options.batch_size, samples, device=options.device)
    lengths = torch.full((options.batch_size,), samples, device=options.device)
    return AudioNoiseBatch(
        sample_id=None,
        audio=audio,
        audio_len=lengths,
        noise=torch.zeros_like(audio),
        noise_len=lengths,
        noisy_audio=audio,
        noisy_audio_len=lengths,
    )


def now() -> float:
    """Return the time when the device has done all that it was given."""
    wait_for_device()
    return time.perf_counter()


def run(model, optimizer, batch) -> tuple[float, float]:
    """Return the seconds of a step, and of its reports."""
    start = now()
    with model.encoder.using_att_context_size(model.encoder.draw_att_context_size()):
        record = model.encode_batch(batch, model.masking_in_context())
        loss = model.objectives.loss(record).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done = now()
        model.reports.of_training_batch(model, record)
        return done - start, now() - done


def main(argv=None) -> None:
    """Time steps and reports, and print the table."""
    options = arguments(argv)
    model, batch = make_model(options), make_batch(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        run(model, optimizer, batch)  # warm up
    times = [run(model, optimizer, batch) for _ in tqdm(range(options.steps), unit='step')]
    step = statistics.median(seconds for seconds, _ in times)
    with_audit, without = (statistics.median(logs for _, logs in times[first::2]) for first in (0, 1))
    device = torch.cuda.get_device_name() if options.device.startswith('cuda') else 'CPU'
    print(f"NeMo {version('nemo_toolkit')}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print(
        f'{options.layers} layers of {options.d_model}, {options.batch_size} x {options.seconds:g} s, '
        f'{options.steps} steps of {step:.3f} s (median)'
    )
    average = without + (with_audit - without) / INTERVAL
    for name, seconds in (
        ('reports of a step', without),
        ('reports of a step with an audit', with_audit),
        (f'on average, an audit every {INTERVAL} steps', average),
    ):
        print(f'{name:<42}{1000 * seconds:>9.2f} ms{seconds / step:>9.3%} of a step')


if __name__ == '__main__':
    main()
