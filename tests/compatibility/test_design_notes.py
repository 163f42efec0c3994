# SPDX-License-Identifier: Apache-2.0
"""What people type who come with snippets from this fork's design notes; each works as it is written there."""

import lightning.pytorch as pl
import pytest
import torch
from spies import recording_contexts
from tiny_nest import batches, fit, noise_batch, tiny_model
from torch.utils.data import DataLoader

from nemo.collections.asr.losses import MLMLoss, MultiMLMLoss
from nemo.collections.asr.modules import RandomBlockMasking
from nemo.collections.asr.parts.att_context import EnhancedDynamicContextModel, create_synced_context_collate

OPTIONS, PROBABILITIES = [[40, 0], [80, 0], [160, 0]], [0.3, 0.3, 0.4]


@pytest.fixture(scope='module')
def batch():
    return noise_batch((2.0, 1.2))


@pytest.mark.parametrize('device', ['meta', pytest.param('cuda', marks=pytest.mark.run_only_on('GPU'))])
def test_masking_in_half_precision(device):
    masking = RandomBlockMasking(feat_in=80, causal=True)
    features, lengths = torch.randn(4, 80, 1000).to(device).half(), torch.tensor([1000, 900, 800, 700]).to(device)
    masked, masks = masking(input_feats=features, input_lengths=lengths)
    assert masked.device.type == masks.device.type == device and masked.dtype == masks.dtype == torch.float16


@pytest.mark.parametrize('frames', [211, 209])
@pytest.mark.parametrize('dtype', [torch.bool, torch.float32])
def test_losses_of_masks_of_two_dimensions(frames, dtype):
    log_probs = torch.randn(32, frames, 16).log_softmax(-1)
    targets, masks = torch.randint(0, 16, (32, 210)), (torch.rand(32, 210) > 0.5).to(dtype)
    loss = MLMLoss()(decoder_outputs=log_probs, targets=targets, masks=masks)
    expanded = masks.unsqueeze(1).expand(-1, 80, -1)
    assert loss == MLMLoss()(decoder_outputs=log_probs, targets=targets, masks=expanded)
    multi = MultiMLMLoss(num_decoders=1, squeeze_single=True)
    assert loss == multi(masks=masks, decoder_outputs=log_probs, targets=targets) and torch.isfinite(loss)


def test_synced_collate_with_a_model_by_position_or_name(batch):
    model = tiny_model()
    by_position = create_synced_context_collate(lambda samples: samples[0], model, OPTIONS, PROBABILITIES)
    for made in DataLoader([batch, batch], batch_size=1, collate_fn=by_position):
        assert list(made.att_context) in OPTIONS
    by_name = create_synced_context_collate(
        base_collate_fn=lambda samples, *more, **options: samples[0],
        model=model,
        context_options=OPTIONS,
        context_probs=PROBABILITIES,
    )
    assert list(by_name([batch], 1, pad=True).att_context) in OPTIONS


class TestContextsByHand:
    @pytest.mark.integration
    def test_on_the_encoder(self):
        model = tiny_model('model.encoder.att_context_size=[[80,0],[160,0],[-1,0]]')
        model.encoder.att_context_size = [160, 0]
        with recording_contexts(model) as record:
            fit(model, batches(2), max_steps=4, max_epochs=-1)
        assert record.attention == [[160, 0]] * 4 and record.masking == [160] * 4
        model.encoder.att_context_size = None
        with recording_contexts(model) as record:
            fit(model, batches(2), max_steps=12, max_epochs=-1)
        assert len(set(record.masking)) > 1

    @pytest.mark.integration
    def test_in_a_curriculum_of_ones_own(self):
        class WidenContext(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                pl_module.encoder.att_context_size = [10 * (1 + trainer.global_step // 2), 0]

        model = tiny_model()
        with recording_contexts(model) as record:
            fit(model, batches(2), max_steps=4, max_epochs=-1, callbacks=[WidenContext()])
        assert record.attention == [[10, 0], [10, 0], [20, 0], [20, 0]] and record.masking == [10, 10, 20, 20]

    def test_by_the_wrapper(self, batch):
        dynamic = EnhancedDynamicContextModel(tiny_model())
        dynamic.set_context(mode_or_context='low')
        assert dynamic.att_context_size == [160, 0]
        dynamic.context_presets['phone'] = [40, 0]
        dynamic.set_context('phone')
        assert dynamic.att_context_size == [40, 0] and dynamic.mask_processor.left_context_size == 40
        log_probs, encoded_lengths, masks, tokens = dynamic.process(batch.audio, batch.audio_len)
        assert log_probs.shape[1] >= encoded_lengths.max() > 0 and not masks.any()
        assert len(log_probs) == len(tokens) == 2


def test_the_clean_signal_alone(batch):
    model = tiny_model().eval()
    log_probs, _, masks, _ = model(input_signal=batch.audio, input_signal_length=batch.audio_len, apply_mask=False)
    assert torch.isfinite(log_probs).all() and not masks.any()


class TestLayers:
    def test_a_left_context_alone(self):
        encoder = tiny_model('model.encoder.n_layers=2').encoder
        encoder.layers[0].self_attention.att_context_size = [40]
        assert encoder.layers[0].self_attention.att_context_size == [40, 0]
        encoder.set_layer_att_context_size([[40], [120]])
        assert encoder.layers[1].self_attention.att_context_size == [120, 0]
        encoder.set_layer_att_context_size([[0, [40]]])
        assert encoder.tightest_left_context() == 10  # that of the batch

    @pytest.mark.parametrize('layers', [1, 2, 4])
    def test_an_anchor_without_brackets_is_explained(self, layers):
        encoder = tiny_model(f'model.encoder.n_layers={layers}').encoder
        with pytest.raises(ValueError) as error:
            encoder.set_layer_att_context_size([[0, 40]])
        assert '[[0, 40]]' in str(error.value) and '[layer, [left, right]]' in str(error.value)
