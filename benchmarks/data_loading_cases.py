# SPDX-License-Identifier: Apache-2.0
"""Read, mix and collate utterances with stock or patched NeMo; run by data_loading.py."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import serve

RATE = 16000
CONFIG = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest/nest_fast-conformer_streaming.yaml'


def write_speech(folder: Path, case: dict) -> None:
    """Write files of coloured noise, a longer one that is mixed in, and their manifests."""
    import json

    import numpy as np
    import soundfile

    generator = np.random.default_rng(0)

    def write(name: str, seconds: float) -> dict:
        samples = np.cumsum(generator.normal(size=int(seconds * RATE)))
        samples = 0.3 * (samples - samples.mean()) / np.abs(samples).max() + generator.normal(0, 0.01, len(samples))
        soundfile.write(folder / name, samples, RATE)
        return {'audio_filepath': name, 'duration': seconds, 'text': ''}

    speech = [write(f"{number}.{case['format']}", case['seconds']) for number in range(case['utterances'])]
    (folder / 'speech.json').write_text(''.join(json.dumps(row) + '\n' for row in speech))
    (folder / 'noise.json').write_text(json.dumps(write('noise.wav', 120.0)) + '\n')


def build(case: dict) -> Callable[[], None]:
    """Return what loads all utterances once, in batches, in this process."""
    import torch
    from omegaconf import OmegaConf

    from nemo.collections.asr.data import ssl_dataset

    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    write_speech(Path(folder.name), case)
    config = OmegaConf.load(CONFIG).model.train_ds
    config.update(
        manifest_filepath=f'{folder.name}/speech.json',
        noise_manifest=f'{folder.name}/noise.json',
        sample_rate=RATE,
        batch_augmentor={**config.batch_augmentor, 'prob': case['prob'], 'max_num_segments': case['segments']},
    )
    dataset = ssl_dataset.get_audio_noise_dataset_from_config(config, 0, 1)
    loader = torch.utils.data.DataLoader(dataset, case['batch'], shuffle=True, collate_fn=dataset.collate_fn)

    def run() -> None:
        for _ in loader:
            pass

    run.folder = folder  # which is removed with it
    return run


def about(run) -> dict:
    """Say whether the dataset is patched."""
    from nemo.collections.asr.data import ssl_dataset

    return {'patched': hasattr(ssl_dataset, 'BadAudioError')}


if __name__ == '__main__':
    serve(build, about)
