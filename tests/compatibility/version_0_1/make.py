# SPDX-License-Identifier: Apache-2.0
"""Makes the files of this folder, which later versions must be able to load; it runs on version 0.1 only.

    git worktree add 0.1 b3a6f6b
    cp -r tests/compatibility/version_0_1 0.1/tests/compatibility/
    PYTHONPATH=0.1/src python 0.1/tests/compatibility/version_0_1/make.py FOLDER

The environment is one of NeMo 3.0.0 with this project installed. ``test_version_0_1.py`` uses the functions, too: what
goes into a file, and what is asked of it, is said once.
"""

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning.pytorch as pl
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tiny_nest import CONFIGS, SAMPLE_RATE, fit, noise_batch, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.att_context import AttContextCurriculum, StreamingOutput, StreamingSession
from nemo_streaming_ssl.report import require_active

NEW_SINCE = 'nemo.collections.asr.parts.streaming'  # a package that version 0.1 does not have
CONTEXTS = [[10, 0], [4, 0], [-1, 0]]  # the first is the default
LAYER_CONTEXTS = [[6, 0], [12, 0]]  # set at run time, so that they are stored with the weights
COMPARED_CONTEXTS = [[10, 0], [-1, 0]]
MODEL = [
    'model.encoder.n_layers=2',
    'model.encoder.ff_expansion_factor=1',
    'model.preprocessor.features=16',
    f'model.encoder.att_context_size={CONTEXTS}',
]

STEPS, MORE_STEPS = 2, 2  # before the checkpoint is saved, and after
UTTERANCES = 8
MILESTONES = [[0, [4, 0]], [3, [10, 0]]]

PENDING = 20600  # samples after which the target of a masked frame is there, and waits for its prediction
FED_AT_ONCE = 5150
# What each stream is fed before its state is saved, no multiple of a frame; the last of several has ended by then.
STREAMS = {
    'several streams': dict(before=[20100, 8500, 4000], ended=[False, False, True], apply_mask=False),
    'masked': dict(before=[PENDING], ended=[False], apply_mask=True),
    'masked, about to begin': dict(before=[100], ended=[False], apply_mask=True),
    'masked, without an axis for codebooks': dict(
        before=[PENDING], ended=[False], apply_mask=True, squeeze_single=True
    ),
}
PIECES = [1500, 3700, 2600, 1000]  # samples that are fed after the state is restored
MASK_PROBABILITY = 0.2  # in streams; enough for some masked frames in a second


def make_model():
    """Make the model of all files."""
    model = tiny_model(*MODEL)
    model.encoder.set_layer_att_context_size(LAYER_CONTEXTS)
    return model


def restore_model(folder: Path, squeeze_single: bool = False):
    """Restore ``model.nemo`` in eval mode.

    Args:
        folder: where it is.
        squeeze_single: whether predictions and targets of the one codebook come without an axis for codebooks.
    """
    path = str(folder / 'model.nemo')
    cls = EncDecDenoiseMaskedTokenPredModel
    cfg = cls.restore_from(path, map_location='cpu', return_config=True)
    for section in (cfg, cfg.quantizer, cfg.decoder, cfg.loss):
        section.squeeze_single = squeeze_single
    return cls.restore_from(path, override_config_path=cfg, map_location='cpu').eval()


def to_8_bits(audio: torch.Tensor) -> torch.Tensor:
    """Return samples as int8, in which they take the least room; at a third of its level, noise hardly clips."""
    return (audio / 3 * 2**7).round().clamp(-(2**7), 2**7 - 1).to(torch.int8)


def from_8_bits(audio: torch.Tensor) -> torch.Tensor:
    """Return int8 samples as float32, with full scale at 1."""
    return audio.float() / 2**7


def offline_outputs(model, samples: torch.Tensor) -> dict:
    """What a model makes, without masking and for each of the compared contexts, of an utterance and of its beginning.

    Args:
        model: in eval mode.
        samples: int8 [2, N], clean and noisy.
    """
    clean, noisy = from_8_bits(samples).unsqueeze(1).expand(-1, 2, -1)
    lengths = torch.tensor([clean.shape[1], clean.shape[1] // 2])
    signals = dict(input_signal=clean, noisy_input_signal=noisy)
    signals.update(input_signal_length=lengths, noisy_input_signal_length=lengths)
    outputs = {}
    for context in COMPARED_CONTEXTS:
        with torch.no_grad(), model.using_att_context_size(context):
            log_probs, lengths, _, tokens = model(**signals, apply_mask=False)
        outputs[str(context)] = as_plain(dict(log_probs=log_probs, lengths=lengths, tokens=tokens))
    return outputs


def as_plain(outputs: dict) -> dict:
    """Return outputs without what NeMo hangs on tensors, its neural types, which would be pickled with them."""
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()
    }


def write_utterances(folder: Path) -> Path:
    """Write noise to train on, each of another length, by which it is known; returns the manifest."""
    lines = []
    for index in range(UTTERANCES):
        seconds = 1.1 + 0.05 * index
        audio = from_8_bits(to_8_bits(noise_batch((seconds,), seed=index).audio[0]))
        soundfile.write(folder / f'{index}.wav', audio.numpy(), SAMPLE_RATE)
        lines.append(json.dumps({'audio_filepath': f'{index}.wav', 'duration': seconds, 'text': ''}))
    manifest = folder / 'noise.json'
    manifest.write_text('\n'.join(lines))
    return manifest


class Steps(pl.Callback):
    """Notes the loss, the context and the lengths of each training step; saves a checkpoint after ``STEPS`` if told to."""

    def __init__(self, checkpoint: Path | None = None):
        self.checkpoint = checkpoint
        self.record = {'loss': [], 'left_context': [], 'lengths': []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.record['loss'].append(float(outputs['loss']))
        self.record['left_context'].append(int(trainer.callback_metrics['att_context_left']))
        self.record['lengths'].append(batch.audio_len.tolist())
        if self.checkpoint is not None and trainer.global_step == STEPS:
            trainer.save_checkpoint(self.checkpoint)


def train(model, manifest: Path, ckpt_path=None, checkpoint=None) -> tuple[pl.Trainer, dict]:
    """Train with a curriculum on a loader that is resumable.

    Args:
        model: the model.
        manifest: what :func:`write_utterances` returned.
        ckpt_path: the checkpoint to go on from.
        checkpoint: where to save one after ``STEPS``.

    Returns:
        the trainer, and what the steps were.
    """
    data = DictConfig(
        dict(
            manifest_filepath=str(manifest),
            sample_rate=SAMPLE_RATE,
            batch_size=2,
            shuffle=True,
            num_workers=0,
            min_duration=0.1,
            use_lhotse=False,
            resumable={'seed': 0},
        )
    )
    loader = model._setup_dataloader_from_config(data)  # so the model's config, which is saved, has no paths in it
    steps = Steps(checkpoint)
    callbacks = [AttContextCurriculum(milestones=MILESTONES), steps]
    return fit(model, loader, STEPS + MORE_STEPS, ckpt_path, max_epochs=-1, callbacks=callbacks), steps.record


def make_session(model, ended: list, apply_mask: bool) -> StreamingSession:
    """A session of as many streams as there are flags, which says everything."""
    wanted = dict(return_log_probs=True, return_tokens=True)
    return StreamingSession(model, len(ended), CONTEXTS[0], apply_mask=apply_mask, **wanted)


def go_on(session: StreamingSession, samples: torch.Tensor) -> dict:
    """Feed a session and finish it; returns all tensors and numbers that it gives out.

    Args:
        session: in mid-stream.
        samples: int8 [B, N], for at least as many streams as there are.
    """
    outputs = [session.step(piece) for piece in from_8_bits(samples[: session.batch_size]).split(PIECES, dim=1)]
    joined = StreamingOutput.concatenate([*outputs, session.finish()])
    return as_plain({name: value for name, value in vars(joined).items() if value is not None})


@contextmanager
def masking_with_probability(model, probability: float):
    """Let a model mask more, or nothing, inside a ``with`` block."""
    configured = model.mask_processor.mask_prob
    model.mask_processor.mask_prob = probability
    try:
        yield
    finally:
        model.mask_processor.mask_prob = configured


def restore_session(model, stream: dict) -> StreamingSession:
    """Make a session and load the state that :func:`make_stream` returned."""
    session = make_session(model, stream['ended'], stream['apply_mask'])
    session.load_state_dict(stream['state'])
    return session


def make_stream(
    folder: Path, samples: torch.Tensor, before: list, ended: list, apply_mask: bool, squeeze_single: bool = False
) -> dict:
    """Feed streams; return their state and what they give out when they go on with the samples.

    No more is masked then: a later version may draw in another way. What was masked before counts still.
    """
    model = restore_model(folder, squeeze_single)
    session = make_session(model, ended, apply_mask)
    fed = from_8_bits(to_8_bits(noise_batch([length / SAMPLE_RATE for length in before], seed=2).audio))
    torch.manual_seed(0)
    with masking_with_probability(model, MASK_PROBABILITY):
        for start in range(0, fed.shape[1], FED_AT_ONCE):
            piece = fed[:, start : start + FED_AT_ONCE]
            session.step(piece, lengths=[min(max(length - start, 0), piece.shape[1]) for length in before])
    session.step(fed[:, :0], ended=ended)
    stream = dict(ended=ended, apply_mask=apply_mask, squeeze_single=squeeze_single, state=session.state_dict())
    with masking_with_probability(model, 0.0):
        return {**stream, 'output': go_on(restore_session(model, stream), samples)}


def make_training(folder: Path) -> dict:
    """Save a checkpoint in the middle of a run, and return what the run does in the steps that come after it."""
    with TemporaryDirectory() as data:
        _, record = train(make_model(), write_utterances(Path(data)), checkpoint=folder / 'checkpoint.ckpt')
    return {name: values[STEPS:] for name, values in record.items()}


def make_config(folder: Path) -> None:
    """Save the config with everything that version 0.1 has: a curriculum, contexts for each layer, all reports."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose('nest_hierarchical_streaming_tiny')
    OmegaConf.resolve(cfg)
    OmegaConf.save(cfg, folder / 'config.yaml')


def main(folder: Path) -> None:
    """Make all files.

    Raises:
        SystemExit: if this is another version.
    """
    require_active()
    if importlib.util.find_spec(NEW_SINCE) is not None:
        raise SystemExit(f"this version has {NEW_SINCE}: it is not 0.1, and its files would show nothing")
    folder.mkdir(parents=True, exist_ok=True)
    make_model().save_to(str(folder / 'model.nemo'))
    make_config(folder)
    training = make_training(folder)
    samples = to_8_bits(noise_batch((1.2, 1.2)).audio)
    outputs = offline_outputs(restore_model(folder), samples)
    torch.save(dict(samples=samples, outputs=outputs, training=training), folder / 'expected.pt')
    samples = to_8_bits(noise_batch((sum(PIECES) / SAMPLE_RATE,) * 3, seed=1).audio)
    streams = {name: make_stream(folder, samples, **stream) for name, stream in STREAMS.items()}
    torch.save(dict(samples=samples, streams=streams), folder / 'stream_state.pt')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
