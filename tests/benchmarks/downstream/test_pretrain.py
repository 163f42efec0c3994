# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the arms: equal beginnings, matched masks, and runs that go on."""

import pytest
import torch

from nemo.collections.asr.parts.objectives.base import BatchInputs


@pytest.fixture(scope='module')
def pretraining(load):
    return load('pretrain')


@pytest.fixture(scope='module')
def small(pretraining):
    return pretraining.Recipe(layers=1, width=16, classes=16, steps=4, crop_frames=160, warmup_steps=1)


def speech(load):
    data = load('data')
    generator = torch.Generator().manual_seed(0)

    def utterance(speaker, frames):
        return data.Utterance(torch.randn(80, frames, generator=generator).half(), [1, 2], speaker)

    roles = {'pretraining': [utterance('a', 400), utterance('b', 400)], 'validation': [utterance('c', 160)]}
    return data.Speech({**roles, 'probe': [utterance('a', 160)], 'test': [utterance('d', 160)]})


@pytest.mark.parametrize('kind', ['causal', 'chunks'])
def test_encoders_and_quantizers_of_a_seed_begin_alike(pretraining, small, kind):
    first, *others = [pretraining.build(name, kind, 3, small) for name in ('random', 'stock-40', 'next', 'both')]
    for part in ('encoder', 'quantizer'):
        wanted = getattr(first, part).state_dict()
        for other in others:
            found = getattr(other, part).state_dict()
            assert all(torch.equal(found[name], value) for name, value in wanted.items()), part
    assert first.encoder.att_context_style == ('regular' if kind == 'causal' else 'chunked_limited')


def test_all_masks_have_the_same_share_and_short_blocks_the_run_of_following_ones(pretraining):
    recipe = pretraining.Recipe(layers=1, width=16, classes=16, crop_frames=400)
    found = {}
    for name in ('stock-40', 'following-40', 'stock-short'):
        model = pretraining.build(name, 'causal', 0, recipe)
        found[name] = pretraining.set_masks(model, name, 'causal', 0, recipe)
        assert found[name]['masked_share'] == pytest.approx(0.3, abs=0.01), name
    assert found['stock-short']['mean_run'] == pytest.approx(found['following-40']['mean_run'], rel=0.08)
    assert found['stock-40']['mean_run'] > 1.2 * found['following-40']['mean_run']
    assert found['stock-short']['block'] < 40


def test_an_interrupted_run_ends_with_the_same_weights(pretraining, small, load, tmp_path, monkeypatch):
    said, folders = speech(load), [tmp_path / name for name in ('whole', 'parts')]
    for folder in folders:
        folder.mkdir()
    whole = pretraining.pretrain('following-40', 'causal', 0, said, small, folders[0])
    step_of = pretraining._step

    def interrupted(model, name, kind, seed, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return step_of(model, name, kind, seed, step, *rest)

    monkeypatch.setattr(pretraining, '_step', interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain('following-40', 'causal', 0, said, small, folders[1])
    monkeypatch.setattr(pretraining, '_step', step_of)
    parts = pretraining.pretrain('following-40', 'causal', 0, said, small, folders[1])
    assert [loss for _, loss in parts['loss']][:2] == pytest.approx([loss for _, loss in whole['loss']][:2])
    assert sorted(path.name for path in folders[1].glob('*.pt')) == [
        'encoder-1.pt', 'encoder-2.pt', 'encoder-4.pt', 'final.pt',
    ]  # fmt: skip
    for ours, theirs in zip(*(torch.load(folder / 'encoder-4.pt').values() for folder in folders)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', ['stock-40', 'next'])
def test_loss_by_distance_adds_up_to_the_loss(pretraining, small, load, name):
    distance = load('distance')
    model = pretraining.build(name, 'causal', 0, small).eval()
    batch = torch.randn(2, 80, 320), torch.tensor([320, 200])
    found = distance.loss_by_distance(model, [batch], (5, 0), draws=1)
    with model.encoder.using_att_context_size((5, 0)), torch.no_grad():
        torch.manual_seed(0)
        record = model.encode(BatchInputs(batch, batch), model.masking_in_context())
        loss = model.objectives.loss(record).loss.item()
        scores = [score for scored in model.objectives.scores(record).values() for score in scored.values()]
    tokens = torch.cat([score.targets.flatten() for score in scores])
    share = torch.bincount(tokens) / len(tokens)
    entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
    frames = sum(count for count, _ in found.values())
    below = sum(count * nats for count, nats in found.values()) / frames
    assert frames == len(tokens) and below == pytest.approx(entropy - loss, abs=1e-4)
