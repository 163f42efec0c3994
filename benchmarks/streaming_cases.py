# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, NeMo's streaming, and sessions in any phase, for the benchmarks."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.streaming.session import StreamingSession

CONFIGS = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest'
SEED = 0
TINY = 'nest_fast-conformer_streaming_tiny'
NO_DATA = ('model.train_ds=null', 'model.validation_ds=null')
SIZES = {  # layers, width, heads, channels of the subsampling
    'tiny': (4, 96, 4, 96),
    '8 x 256': (8, 256, 4, 256),
    '8 x 512': (8, 512, 8, 256),
    '17 x 512': (17, 512, 8, 256),
}


def shipped_model(config: str, *overrides: str) -> EncDecDenoiseMaskedTokenPredModel:
    """Build the model of a shipped config, with random weights and without data."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(config, overrides=[*NO_DATA, *overrides]).model
    OmegaConf.resolve(cfg)
    torch.manual_seed(SEED)
    return EncDecDenoiseMaskedTokenPredModel(cfg).eval()


def model_of_size(size: str) -> EncDecDenoiseMaskedTokenPredModel:
    """Build a model of one of ``SIZES``."""
    names = 'n_layers', 'd_model', 'n_heads', 'subsampling_conv_channels'
    return shipped_model(TINY, *(f'model.encoder.{name}={value}' for name, value in zip(names, SIZES[size])))


class NemoStream:
    """NeMo's cache-aware streaming of one encoder, on ready-made features, with all streams in step.

    Args:
        model: the model.
        context: [left, 0], or chunks.
        samples: [B, N], of which the features are taken chunk by chunk, again and again.
    """

    def __init__(self, model, context, samples: torch.Tensor):
        self.encoder = model.encoder
        self.encoder.set_default_att_context_size(context)
        self.cfg = self.encoder.streaming_cfg
        self.caches = self.encoder.get_initial_cache_state(batch_size=len(samples))
        self.first, self.shift = self.cfg.shift_size
        self.overlap = self.cfg.pre_encode_cache_size[1]
        lengths = torch.full((len(samples),), samples.shape[1])
        self.features, _ = model.preprocessor(input_signal=samples, length=lengths)
        self.chunks = (self.features.shape[2] - self.first) // self.shift
        self.index = 0

    @torch.no_grad()
    def step(self) -> None:
        """Run the next chunk; with causal subsampling the first one is one frame."""
        end = self.first + self.index * self.shift
        before = min(end - self.shift, self.overlap)  # NeMo fills up with zeros
        chunk = self.features[:, :, end - self.shift - before : end] if self.index else self.features[:, :, :end]
        if self.index:
            chunk = torch.nn.functional.pad(chunk, (self.overlap - before, 0))
        _, _, *self.caches = self.encoder.cache_aware_stream_step(
            processed_signal=chunk,
            processed_signal_length=torch.full((len(chunk),), chunk.shape[2]),
            cache_last_channel=self.caches[0],
            cache_last_time=self.caches[1],
            cache_last_channel_len=self.caches[2],
            keep_all_outputs=False,
            drop_extra_pre_encoded=self.cfg.drop_extra_pre_encoded if self.index else 0,
        )
        self.index = 1 + self.index % (self.chunks - 1)


class SessionStream:
    """A session that takes chunk after chunk of the same samples.

    Args:
        model: the model.
        context: of the session.
        samples: [B, N].
        frames: in a chunk.
        mixed: whether the streams are in different phases, and some half a chunk ahead.
        idle: whether the last stream gets no samples.
        settings: further ones of the session.
    """

    def __init__(self, model, context, samples: torch.Tensor, frames: int = 1, mixed=False, idle=False, **settings):
        self.session = StreamingSession(model, len(samples), context, **settings)
        self.chunks = samples.split(frames * self.session.frame_samples, dim=1)
        self.index = 0
        self.lengths = [self.chunks[0].shape[1]] * (len(samples) - 1) + [0] if idle else None
        if mixed:
            chunk = self.session.frame_samples
            self.session.step(samples[:, :chunk], [(137 * row) % chunk for row in range(len(samples))])

    def step(self):
        """Take the next chunk."""
        self.index = (self.index + 1) % (len(self.chunks) - 1)  # the last chunk can be shorter
        return self.session.step(self.chunks[self.index], self.lengths)
