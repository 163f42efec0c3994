# SPDX-License-Identifier: Apache-2.0
"""The parts of a training step for ``training_step.py``, from stock and from patched NeMo.

``training_step.py`` runs it in processes of its own, one for each case and each NeMo, with the overlay off for stock.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import serve
from torch.utils.flop_counter import FlopCounterMode

FEATURES, CLASSES, CODE_DIM, FACTOR, HOP_SECONDS = 80, 8192, 16, 8, 0.01
CONFIG = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest/nest_fast-conformer_streaming.yaml'
NOT_IN_STOCK = (
    'target_normalize validate_contexts validation_masks audit_every_n_batches log_figures '
    'masking.causal encoder.att_context_seed encoder.blockwise_attention loss.decoder_offset'
).split()


@dataclass
class Run:
    """What runs a case, and the bytes that it must at least read and write."""

    call: Callable[[], object]
    bytes_moved: int

    def __call__(self) -> None:
        """Run the case once."""
        self.call()


def is_patched() -> bool:
    """Whether this process runs the patched NeMo."""
    try:
        from nemo_streaming_ssl import PatchFinder
    except ImportError:
        return False
    return PatchFinder in sys.meta_path


def device_of(case: dict) -> str:
    """Where a case runs: by default on the CPU."""
    return case.get('device', 'cpu')


def masking(case: dict) -> Run:
    """Mask a batch of features; the patched module does so within a left context of 40 attention frames."""
    from nemo.collections.asr.modules import RandomBlockMasking

    kind = dict(mask_prob=0.01, block_size=40) if case['overlap'] else dict(mask_prob=0.5, block_size=48)
    module = RandomBlockMasking(FEATURES, allow_overlap=case['overlap'], **kind).to(device_of(case))
    context = {}
    if is_patched():
        module.subsampling_factor = FACTOR
        context = {'effective_left_context': 40}
    features, lengths = feature_batch(case)
    moved = 2 * features.numel() * features.element_size()  # each feature is read and written
    return Run(lambda: module(input_feats=features, input_lengths=lengths, **context), moved)


def quantizer(case: dict) -> Run:
    """Find the nearest of 8192 codes for every frame of 80 ms."""
    from nemo.collections.asr.modules import RandomProjectionVectorQuantizer

    module = RandomProjectionVectorQuantizer(
        FEATURES, CODE_DIM, CLASSES, num_books=1, dist_fn='l2', combine_time_steps=FACTOR
    ).to(device_of(case))
    features, _ = feature_batch(case)
    features = features[..., : features.shape[2] // FACTOR * FACTOR]
    moved = features.numel() * features.element_size()
    return Run(lambda: module(input_signal=features), moved)


def decoder_and_loss(case: dict) -> Run:
    """Decoder and loss, forward and backward, with a third of the frames masked, as blocks of 5 frames."""
    from nemo.collections.asr.losses import MultiMLMLoss
    from nemo.collections.asr.modules import MultiSoftmaxDecoder

    frames = int(case['seconds'] / HOP_SECONDS) // FACTOR
    batch, width, device = case['batch'], case['d_model'], device_of(case)
    decoder = MultiSoftmaxDecoder(width, CLASSES, use_bias=True).to(device)
    loss = MultiMLMLoss(combine_time_steps=FACTOR)
    encoded = torch.randn(batch, width, frames, device=device, requires_grad=True)
    tokens = torch.randint(CLASSES, (batch, frames, 1), device=device)
    lengths = torch.full((batch,), frames, device=device)
    hidden = (torch.arange(frames, device=device) // 5 % 3 == 0).float().repeat_interleave(FACTOR)
    masks = hidden.expand(batch, FEATURES, -1)

    def whole():
        log_probs = decoder(encoder_output=encoded)
        loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=lengths).backward()

    def masked_only():
        from nemo.collections.asr.parts.objectives.base import gather_loss_positions

        positions = gather_loss_positions(*loss.align(encoded.transpose(1, 2), tokens, masks, lengths))
        loss.of_frames(*positions.decoded(decoder)[:2]).backward()

    weights = sum(p.numel() for p in decoder.parameters())
    return Run(masked_only if is_patched() else whole, 4 * (2 * encoded.numel() + 3 * weights))


def step(case: dict) -> Run:
    """A whole training step of the streaming configuration: forward, backward and AdamW."""
    model, batch = step_model(case)

    def run():
        model._trainer.global_step += 1
        model._optimizer.zero_grad()
        model.training_step(batch, 0)['loss'].backward()
        model._optimizer.step()

    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Run(run, 4 * 8 * weights)  # weights, gradients and both moments are read and written


def step_model(case: dict):
    """A model of the streaming configuration in training, with an optimizer, and a batch of noise.

    Without causal downsampling, whose lengths stock's loss cannot take, and without a left context of the masking or
    a normalisation of the targets in stock, which has neither.
    """
    from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
    from nemo.collections.asr.models import EncDecDenoiseMaskedTokenPredModel

    model = EncDecDenoiseMaskedTokenPredModel(step_config(case)).to(device_of(case))
    model._trainer = SimpleNamespace(global_step=0)
    model.log_dict = lambda *args, **kwargs: None  # NeMo hands a step's log to the trainer
    model.train()
    model._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    samples = int(case['seconds'] * 16000)
    audio = torch.randn(case['batch'], samples, device=device_of(case)) * 0.1
    lengths = torch.full((case['batch'],), samples, device=device_of(case))
    ids = [str(index) for index in range(case['batch'])]
    return model, AudioNoiseBatch(ids, audio, lengths, audio * 0.1, lengths, audio * 1.1, lengths)


def step_config(case: dict):
    """The streaming configuration in the case's size; for stock, without the keys that stock lacks."""
    from omegaconf import OmegaConf, open_dict

    cfg = OmegaConf.load(CONFIG)
    cfg.model.encoder.causal_downsampling = False
    cfg.model.loss.decoder_offset = 0
    cfg.model.encoder.update(d_model=case['d_model'], n_layers=case['layers'], att_context_size=case['contexts'])
    if case['d_model'] == 176:
        cfg.model.encoder.n_heads = 4
    del cfg.model.train_ds, cfg.model.validation_ds, cfg.model.optim
    OmegaConf.resolve(cfg)
    with open_dict(cfg):
        cfg.model.update(case.get('model', {}))  # of the patched NeMo alone
        for path in () if is_patched() else NOT_IN_STOCK:
            *parents, key = path.split('.')
            node = cfg.model if not parents else cfg.model[parents[0]]
            if key in node:
                del node[key]
    return cfg.model


def feature_batch(case: dict):
    """Features [B, D, T] of so many seconds, and their lengths [B]."""
    frames = int(case['seconds'] / HOP_SECONDS)
    shape = case['batch'], FEATURES, frames
    return torch.randn(shape, device=device_of(case)), torch.full(shape[:1], frames, device=device_of(case))


PARTS = {'masking': masking, 'quantizer': quantizer, 'decoder and loss': decoder_and_loss, 'step': step}


def about(run: Run) -> dict:
    """Say whether a case runs patched, and what bounds it: its operations and the bytes that it must move."""
    with FlopCounterMode(display=False) as operations:
        run()
    return dict(
        patched=is_patched(),
        operations=operations.get_total_flops(),
        bytes=run.bytes_moved,
    )


def build(case: dict) -> Run:
    """Build a case."""
    torch.manual_seed(0)
    return PARTS[case['part']](case)


if __name__ == '__main__':
    serve(build, about)
