# SPDX-License-Identifier: Apache-2.0
"""The numbers of a logging interval, against computations by hand; on two ranks in ``training_numbers_run.py``."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from ranks import run_on_two_ranks
from tiny_nest import RecordingLogger, noise_batch, tiny_model, trainer

from nemo.collections.asr.parts.mixins.training_numbers_mixin import IntervalNumbers

LENGTHS = (1.0, 0.6), (0.8, 0.8), (1.2, 0.4), (0.5, 0.5)
RUN = Path(__file__).with_name('training_numbers_run.py')


class Fixed(torch.utils.data.Dataset):
    """Batches of known lengths; some have sources."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        batch = noise_batch(LENGTHS[index], seed=index)
        batch.sources = [{1: 'phone', 3: 'of no group'}.get(index, 'books'), 'phone']
        return batch


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A model that trained four steps, its logger, and the updates that it made."""
    fitter = trainer(4, log_every_n_steps=2)
    fitter.logger = RecordingLogger()
    model = tiny_model('model.log_peak_flops=1e9')
    mixture = tmp_path_factory.mktemp('mixture') / 'mixture.yaml'
    OmegaConf.save([{'tags': {'source': name}} for name in ('phone', 'books')], mixture)
    with open_dict(model.cfg):
        model.cfg.update(train_ds={'input_cfg': str(mixture)}, skip_nan_grad=True)
    model._skipped_utterances = 3
    weights = []
    take = model.on_before_optimizer_step

    def remember(optimizer):
        take(optimizer)
        weights.append([weight.detach().clone() for weight in model.parameters() if weight.grad is not None])

    model.on_before_optimizer_step = remember
    model.set_trainer(fitter)
    fitter.fit(model, torch.utils.data.DataLoader(Fixed(), batch_size=None))
    return model, fitter.logger, weights


def test_logs_once_in_an_interval_what_its_steps_add_up_to(run):
    model, logger, _ = run
    padding = logger.column('padding_share')
    assert padding == pytest.approx([1 - (1.0 + 0.6 + 0.8 + 0.8) / 3.6, 1 - (1.2 + 0.4 + 0.5 + 0.5) / 3.4], abs=1e-3)
    audio, ratio = logger.column('audio_seconds_per_second'), logger.column('predicted_tokens_per_second')
    assert len(audio) == len(ratio) == 2 and audio == logger.column('audio_seconds_per_second/rank')
    assert logger.column('skipped_utterances') == [3.0, 3.0]
    assert all(0.05 < peak < 1000 for peak in logger.column('peak_memory_gb'))
    share, flops = logger.column('model_flops_share'), logger.column('model_tflops_per_second')
    assert share == pytest.approx([value * 1e3 for value in flops])


def test_the_update_to_weight_ratio_is_that_of_the_last_step(run):
    model, logger, weights = run
    before, after = weights[3], [weight.detach() for weight in model.parameters() if weight.requires_grad]
    after = [weight for weight in after if any(weight.shape == old.shape for old in before)]
    assert len(logger.column('update_to_weight_ratio')) == 2
    norm = sum(weight.square().sum() for weight in before).sqrt()
    update = sum((new - old).square().sum() for new, old in zip(after, before, strict=True)).sqrt()
    assert logger.column('update_to_weight_ratio')[1] == pytest.approx(float(update / norm), rel=1e-4)


def test_sources_have_losses_of_their_own(run):
    _, logger, _ = run
    both = zip(logger.column('train_loss/source/books'), logger.column('train_loss/source/phone'), strict=True)
    pairs = list(both)
    assert all(2 < loss < 12 for pair in pairs for loss in pair), pairs


def test_means_are_means_of_all_values_and_sums_are_sums():
    numbers, device = IntervalNumbers(), torch.device('cpu')
    for step in (
        {'tokens': (3,), 'loss': (torch.tensor(1.0), 1)},
        {'tokens': (4,), 'loss': (2.0, 1), 'rare': (5.0, 1)},
    ):
        for name, value in step.items():
            numbers.add(name, *value)
    numbers.add('sources', torch.tensor([6.0, 0.0]), torch.tensor([3, 0]))
    numbers.add('counts', torch.tensor([[1, 2]]))
    values = {name: value.tolist() for name, value in numbers.reduce(device).items()}
    assert values.pop('sources') == pytest.approx([2.0, math.nan], nan_ok=True)
    assert values == {'tokens': 7.0, 'loss': 1.5, 'rare': 5.0, 'counts': [[1.0, 2.0]]}
    for name, value in {'ctx_a': 1.0, 'ctx_b': 2.0}.items():
        numbers.add(name, value, 1.0)
    numbers.limit('ctx_', {'ctx_a', 'ctx_c'})
    values = numbers.reduce(device)
    assert values['ctx_a'] == 1 and values['ctx_c'].isnan() and len(values) == 2


def test_flops_are_those_of_a_hand_computation():
    model = tiny_model('model.encoder.n_layers=2')
    record = SimpleNamespace(encoded=torch.zeros(3, 96, 20))
    with model.encoder.using_att_context_size([5, 0]):
        found = model.flops_of_step(record, torch.tensor(10))
    model.encoder._active = 5, 1, 0  # as NeMo's chunked_limited_with_rc has
    assert model.flops_of_step(record, torch.tensor(10)) == found
    encoder = sum(weight.numel() for weight in model.encoder.parameters() if weight.dim() > 1)
    decoder = sum(weight.numel() for weight in model.decoder.parameters() if weight.dim() > 1)
    d_model = model.cfg.encoder.d_model
    assert found == 3 * (6 * encoder * 20 + 12 * 2 * d_model * 20 * 6) + 6 * decoder * 10


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    """What two gloo ranks find."""
    return run_on_two_ranks(RUN, tmp_path_factory.mktemp('ranks'))


def test_two_ranks_log_the_mean_over_both_and_sums_of_both(two_ranks):
    first, second = two_ranks
    assert first['numbers'] == second['numbers'] == {'loss': 2.0, 'tokens': 7.0}
    assert first['counts'] == [3.0, 0.0, 5.0]


def test_the_loss_over_all_ranks_has_the_gradient_of_one_process(two_ranks):
    for objective in ('masked', 'next_token', 'both'):
        for rank in two_ranks:
            assert rank[objective]['global'] == pytest.approx(rank[objective]['alone'], rel=1e-4, abs=1e-6)
        assert two_ranks[0][objective]['rank'] != pytest.approx(two_ranks[0][objective]['alone'], rel=1e-3)


def test_masking_after_the_subsampling_trains_on_two_ranks(two_ranks):
    assert all(len(rank['post_conv']) == 3 for rank in two_ranks)


def test_sharded_layers_compute_in_the_trainers_precision(two_ranks):
    assert two_ranks[0]['gathered'] == {'32-true': 'torch.float32', 'bf16-mixed': 'torch.bfloat16'}
