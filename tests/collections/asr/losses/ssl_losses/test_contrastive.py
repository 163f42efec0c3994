# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
import torch
from tiny_nest import noise_batch, tiny_config

from nemo.collections.asr.losses.ssl_losses import contrastive
from nemo.collections.asr.losses.ssl_losses.contrastive import ContrastiveLoss
from nemo.collections.asr.models.ssl_models import SpeechEncDecSelfSupervisedModel

StockLoss = contrastive._up.ContrastiveLoss
CHANNELS = 4
MARK = 777.0  # in padded frames only
SAME = pytest.mark.parametrize('same_utterance', [True, False], ids=['same_utterance', 'batch'])
NON_MASKED = pytest.mark.parametrize('non_masked', [False, True], ids=['masked', 'non_masked'])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_loss(cls=ContrastiveLoss, same_utterance=True, non_masked=False, num_negatives=5, project=False, **kwargs):
    """A loss whose targets are the features themselves, and that keeps the negatives of each call."""
    loss = cls(
        in_dim=CHANNELS,
        proj_dim=CHANNELS,
        num_negatives=num_negatives,
        sample_from_same_utterance_only=same_utterance,
        sample_from_non_masked=non_masked,
        **kwargs,
    )
    if not project and not loss.quantized_targets:
        loss.target_proj = torch.nn.Identity()
    similarity, loss.drawn = loss._calculate_similarity, []

    def keeping(logits, negatives, targets):
        loss.drawn.append(negatives.detach())
        return similarity(logits, negatives, targets)

    loss._calculate_similarity = keeping
    return loss


def make_batch(masked, frames=20, lengths=None):
    """Arguments for the loss; ``masked`` names each utterance's masked frames. Padding is marked, and masked too."""
    spectrograms = torch.randn(len(masked), CHANNELS, frames)
    masks = torch.zeros_like(spectrograms)
    for row, own in enumerate(masked):
        masks[row][:, own] = 1
    arguments = dict(
        spectrograms=spectrograms,
        spec_masks=masks,
        decoder_outputs=torch.randn(len(masked), frames, CHANNELS, requires_grad=True),
    )
    if lengths is not None:
        arguments['decoder_lengths'] = torch.tensor(lengths)
        for row, length in enumerate(lengths):
            spectrograms[row, :, length:] = MARK
            masks[row, :, length:] = 1
    return arguments


@SAME
@NON_MASKED
def test_no_negative_is_padding(same_utterance, non_masked):
    # As many masked frames in each row as stock asks for, padding included: 4 + 8 and 10 + 2.
    batch = make_batch([range(4), range(10)], lengths=[12, 18])
    loss = make_loss(same_utterance=same_utterance, non_masked=non_masked)
    for _ in range(200):
        loss(**batch)
    assert not any((negatives == MARK).any() for negatives in loss.drawn)
    assert len(loss.drawn) == 200 and loss.drawn[0].shape == (5, 14, CHANNELS)

    stock = make_loss(StockLoss, same_utterance=same_utterance, non_masked=non_masked)
    for _ in range(20):
        stock(**batch)
    assert any((negatives == MARK).any() for negatives in stock.drawn)


@NON_MASKED
def test_utterances_with_different_numbers_of_masked_frames(non_masked):
    batch = make_batch([[2, 3], range(5, 14), []])
    loss = make_loss(non_masked=non_masked, num_negatives=2)
    value = loss(**batch)
    value.backward()
    assert value > 0 and torch.isfinite(batch['decoder_outputs'].grad).all()
    negatives, features = loss.drawn[0], batch['spectrograms'].transpose(1, 2)
    assert negatives.shape == (2, 11, CHANNELS)
    for column, row in enumerate([0] * 2 + [1] * 9):  # each from its own utterance
        candidates = features[row] if non_masked else features[row][[[2, 3], range(5, 14)][row]]
        assert all(any(torch.equal(drawn, frame) for frame in candidates) for drawn in negatives[:, column])

    with pytest.raises(RuntimeError):  # where the sum happens to divide, it mixes the utterances
        make_loss(StockLoss, non_masked=non_masked, num_negatives=2)(**batch)


@SAME
def test_fewer_candidates_than_negatives_are_drawn_with_replacement(same_utterance):
    batch = make_batch([[1, 2], [4, 5, 6]])
    loss = make_loss(same_utterance=same_utterance, num_negatives=12)
    value = loss(**batch)
    value.backward()
    assert torch.isfinite(value) and loss.drawn[0].shape == (12, 5, CHANNELS)


@SAME
@NON_MASKED
@pytest.mark.parametrize('reduce', ['sum', 'mean'])
@pytest.mark.parametrize('quantized', [False, True])
def test_nothing_masked_gives_a_zero_loss_that_back_propagates(same_utterance, non_masked, quantized, reduce):
    options = dict(same_utterance=same_utterance, non_masked=non_masked, project=True, quantized_targets=quantized)
    options.update(codebook_size=8, reduce=reduce)
    loss = make_loss(**options)
    batch = make_batch([[], []])
    value = loss(**batch)
    value.backward()
    assert value == 0 and value.shape == ()
    assert not batch['decoder_outputs'].grad.any()
    assert all(weight.grad is not None and not weight.grad.any() for weight in loss.parameters())


def test_only_padding_masked_is_nothing_masked():
    loss = make_loss()
    assert loss(**make_batch([[], []], lengths=[12, 12])) == 0 and not loss.drawn


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(non_masked=True, num_negatives=20),
        dict(same_utterance=False, num_negatives=16),
        dict(same_utterance=False, non_masked=True, num_negatives=40),
        dict(reduce='mean', logit_temp=0.3, multiplier=2.0),
        dict(quantized_targets=True, reduce_ids=True),
        dict(quantized_targets=True, store_ids=False, prob_ppl_weight=0.0),
        dict(quantized_targets=True, same_utterance=False, group_loss=True, num_groups=1),  # NeMo's own
    ],
)
@pytest.mark.parametrize('feature_frames', [20, 38])  # 38: two for each output, and two are missing
def test_where_all_candidates_are_drawn_the_loss_is_stocks(options, feature_frames):
    options = {'num_negatives': 8, 'codebook_size': 16, 'project': True, **options}
    batch = make_batch([range(8), range(6, 14)])
    if feature_frames == 38:
        batch['spectrograms'], batch['spec_masks'] = (
            batch[name].repeat_interleave(2, dim=2)[..., :38] for name in ('spectrograms', 'spec_masks')
        )
        options['combine_time_steps'] = 2
    losses = [make_loss(cls, **options).eval() for cls in (ContrastiveLoss, StockLoss)]
    losses[0].load_state_dict(losses[1].state_dict())
    ours, stocks = (loss(**batch) for loss in losses)
    torch.testing.assert_close(ours, stocks)
    with_lengths = losses[0](**batch, decoder_lengths=torch.tensor([20, 20]))
    torch.testing.assert_close(with_lengths, stocks)
    if options.get('quantized_targets') and options.get('store_ids', True):
        assert torch.equal(losses[0].target_ids, losses[1].target_ids)
        lengths = [loss.target_lengths for loss in losses]
        assert lengths[0] is lengths[1] is None or torch.equal(*lengths)


@SAME
@NON_MASKED
def test_without_padding_the_distribution_is_stocks(same_utterance, non_masked):
    batch = make_batch([[1, 2, 3, 4], [5, 6, 7, 8]], frames=10)
    batch['spectrograms'][:, 0] = torch.arange(20.0).view(2, 10)  # the first channel names the frame
    shares, doubles = [], []
    for cls in (ContrastiveLoss, StockLoss):
        loss = make_loss(cls, same_utterance=same_utterance, non_masked=non_masked, num_negatives=3)
        for _ in range(600):
            loss(**batch)
        names = torch.stack(loss.drawn)[..., 0]  # [draws, negatives, targets]
        targets = [1, 2, 3, 4, 15, 16, 17, 18]
        # Stock lists the targets of equal numbers time first, and so does its draw.
        if cls is StockLoss and same_utterance:
            targets = [1, 15, 2, 16, 3, 17, 4, 18]
        columns = [targets.index(name) for name in (1, 16)]
        shares.append([Counter(names[..., column].flatten().tolist()) for column in columns])
        doubles.append(sum(len(set(draw)) < 3 for draw in names[..., columns[0]].tolist()))
    assert doubles == [0, 0]
    for ours, stocks in zip(*shares):
        assert ours.keys() == stocks.keys()
        assert all(abs(ours[name] - stocks[name]) < 5 * (2 * stocks[name]) ** 0.5 for name in stocks)


@pytest.mark.parametrize('frames', [1, 7, 8, 9, 40, 48, 55, 64])
def test_short_batches_of_a_causal_encoder(frames):
    """Which makes frames // 8 + 1 outputs; dividing the lengths gives 8 feature frames for each from 64 on only."""
    loss = make_loss(combine_time_steps=8, project=True, num_negatives=3)
    spectrograms = torch.randn(2, CHANNELS, frames)
    outputs = torch.randn(2, frames // 8 + 1, CHANNELS, requires_grad=True)
    value = loss(spectrograms=spectrograms, spec_masks=torch.ones_like(spectrograms), decoder_outputs=outputs)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(outputs.grad).all()


def speech_model(**loss):
    """A model of NeMo's contrastive pre-training, tiny."""
    cfg, modules = tiny_config().model, 'nemo.collections.asr.modules'
    patches = dict(freq_masks=0, freq_width=1, patch_size=16, mask_patches=0.5)
    cfg.spec_augment = {'_target_': f'{modules}.MaskedPatchAugmentation', **patches}
    sizes = dict(feat_in=cfg.encoder.d_model, feat_hidden=8, feat_out=8, stride_layers=0, non_stride_layers=0)
    cfg.decoder = {'_target_': f'{modules}.ConvASRDecoderReconstruction', **sizes}
    sizes = dict(in_dim=80, proj_dim=8, combine_time_steps=8, num_negatives=4)
    cfg.loss = {'_target_': 'nemo.collections.asr.losses.ContrastiveLoss', **sizes, **loss}
    torch.manual_seed(0)
    return SpeechEncDecSelfSupervisedModel(cfg)


@pytest.mark.parametrize('in_list', [False, True], ids=['loss', 'loss_list'])
def test_the_loss_gets_the_lengths(in_list):
    model, given = speech_model(), []
    loss, decoder = model.loss, model.decoder_ssl
    loss.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs['decoder_lengths']), with_kwargs=True)
    if in_list:
        of_list = torch.nn.ModuleDict({'decoder': decoder, 'loss': loss})
        model.decoder_losses, model.targets_from_loss = torch.nn.ModuleDict({'one': of_list}), {'one': None}
        model.loss_alphas, model.decoder_losses_active = {'one': 1.0}, {'one': True}
        model.output_from_layer, model.transpose_encoded = {'one': None}, {'one': False}
    batch = noise_batch((2.0, 1.2))
    spectrograms, masks, encoded, lengths = model(input_signal=batch.audio, input_signal_length=batch.audio_len)
    value, _ = model.decoder_loss_step(spectrograms, masks, encoded, lengths)
    assert len(given) == 1 and given[0] is lengths and lengths[0] > lengths[1]
    assert torch.isfinite(value)
