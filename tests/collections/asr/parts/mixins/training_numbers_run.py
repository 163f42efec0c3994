# SPDX-License-Identifier: Apache-2.0
"""What two gloo ranks find; run by test_training_numbers_mixin.py.

Usage: training_numbers_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Leaves FOLDER/RANK.json.
"""

from types import SimpleNamespace

import torch
from ranks import run_ranks
from tiny_nest import POST_CONV, TWO_LAYERS, noise_batch, signals, tiny_model
from torch.distributed.device_mesh import init_device_mesh

from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
from nemo.collections.asr.parts.mixins.training_numbers_mixin import IntervalNumbers

SECONDS = (1.6, 0.4)  # of each rank's utterance
STILL = 'model.preprocessor.dither=0.0', 'model.encoder.dropout=0.0', 'model.encoder.dropout_pre_encoder=0.0'
STILL = *TWO_LAYERS, *STILL, 'model.encoder.dropout_att=0.0'


def mask_half(input_feats, input_lengths):
    """Mask every other 16 feature frames, the same ones in each batch."""
    masks = (torch.arange(input_feats.shape[2]) // 16 % 2).expand_as(input_feats).float()
    return input_feats * (1 - masks), masks


def gradient(model, batch) -> torch.Tensor:
    model.zero_grad()
    with model.encoder.using_att_context_size([10, 0]):
        record = model.encode_batch(batch, mask_half if model.objectives.masks else None)
        model.objectives.loss(record).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def losses(objective: str, rank: int) -> dict:
    """Samples of the mean gradient of both ranks, and of the gradient of all utterances in one process."""
    batches = [noise_batch((seconds,), seed=seed) for seed, seconds in enumerate(SECONDS)]
    found = {}
    for over in ('rank', 'global'):
        model = tiny_model(*STILL, f'+model.objective={objective}', f'model.loss_over={over}').train()
        mean = gradient(model, batches[rank])
        torch.distributed.all_reduce(mean)
        found[over] = (mean / 2)[::1000].tolist()
    group, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    found['alone'] = gradient(model, joined(batches))[::1000].tolist()
    torch.distributed.is_initialized = group
    return found


def joined(batches) -> AudioNoiseBatch:
    """One batch of the utterances of two."""
    pad = torch.nn.utils.rnn.pad_sequence
    audio, noisy = (
        pad([getattr(batch, name)[0] for batch in batches], batch_first=True) for name in ('audio', 'noisy_audio')
    )
    lengths = torch.cat([batch.audio_len for batch in batches])
    return AudioNoiseBatch(['0', '1'], audio, lengths, noisy - audio, lengths, noisy, lengths)


def post_conv(rank: int) -> list[float]:
    """The losses of three steps under DDP."""
    model = tiny_model(*TWO_LAYERS, *POST_CONV).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    found = []
    for step in range(3):
        log_probs, lengths, masks, tokens = wrapped(**signals(noise_batch(seed=step + 3 * rank)), apply_mask=True)
        loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=lengths)
        loss.backward()
        found.append(loss.item())
    return found


def gathered() -> dict[str, str]:
    """The precision of a layer's weights while it computes, by that of the trainer."""
    found = {}
    for precision in ('32-true', 'bf16-mixed'):
        model = tiny_model(*STILL).train()
        model._trainer = SimpleNamespace(precision=precision)
        model._device_mesh = init_device_mesh('cpu', (2, 1), mesh_dim_names=('data_parallel', 'tensor_parallel'))
        model.configure_model()
        norm = model.encoder.layers[1].norm_out

        def remember(module, *_, precision=precision):
            found[precision] = str(module.weight.dtype)

        norm.register_forward_pre_hook(remember)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16-mixed'):
            gradient(model, noise_batch())
    return found


def find(rank, folder):
    numbers = IntervalNumbers()
    numbers.add('tokens', 3 + rank)
    for loss in (1.0, [2.0, 4.0][rank]):
        numbers.add('loss', loss, 1.0)
    numbers.add('counts', torch.tensor([[1, 0, 2], [2, 0, 3]][rank]))
    values = {name: value.tolist() for name, value in numbers.reduce(torch.device('cpu')).items()}
    results = dict(counts=values.pop('counts'), numbers=values)
    results.update({objective: losses(objective, rank) for objective in ('masked', 'next_token', 'both')})
    return {**results, 'post_conv': post_conv(rank), 'gathered': gathered()}


if __name__ == '__main__':
    run_ranks(find, 'gloo')
