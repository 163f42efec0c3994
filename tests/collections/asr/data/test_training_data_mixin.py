# SPDX-License-Identifier: Apache-2.0
"""Training data of a model: own options, spawned workers, platforms without POSIX, undivided data, several validation sets."""

import json
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from fresh_process import run_python
from lhotse import CutSet, Recording
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from omegaconf import OmegaConf, open_dict
from tiny_nest import batches, tiny_config, tiny_model, trainer
from torch.utils.data import DataLoader, DistributedSampler

from nemo.collections.asr.data.training_data_mixin import warn_of_undivided_data
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel


@pytest.fixture(scope='module')
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp('speech')
    with open(folder / 'm.json', 'w') as lines:
        for number in range(4):
            soundfile.write(folder / f'{number}.wav', np.random.default_rng(number).normal(0, 0.1, 20000), 16000)
            lines.write(json.dumps({'audio_filepath': f'{number}.wav', 'duration': 1.25}) + '\n')
    return folder


SPAWNED = """
import multiprocessing, os, sys
sys.modules['fcntl'] = None  # as on Windows
sys.modules['resource'] = None
os.environ.setdefault('USER', 'someone')  # as there
for name in ('getuid', 'fork'):
    delattr(os, name)
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, IterableDataset

class Loaded(IterableDataset):
    def __init__(self, loaders):
        self.loaders = loaders

    def __iter__(self):
        return (sum(len(batch.audio) for batch in loader) for loader in self.loaders)

if __name__ == '__main__':
    from tiny_nest import tiny_model
    import nemo.collections.asr.parts.utils.pretraining_checks
    from nemo.collections.asr.data.loader_workers import end_workers_with_their_parent
    from nemo.utils.left_out import LEFT_OUT
    section = {'sample_rate': 16000, 'batch_size': 2, 'shuffle': True, 'num_workers': 0, 'resumable': {'seed': 0}}
    section |= {'manifest_filepath': sys.argv[1], 'noise_manifest': sys.argv[4], 'skip_bad_audio': True}
    model = tiny_model()
    tarred = {'is_tarred': True, 'tarred_audio_filepaths': sys.argv[2], 'resumable': None}
    shar = {'use_lhotse': True, 'shar_path': sys.argv[3], 'manifest_filepath': None, 'force_finite': True}
    loaders = [model._setup_dataloader_from_config(OmegaConf.create({**section, **more})) for more in ({}, tarred, shar)]
    spawned = DataLoader(Loaded(loaders), batch_size=None, num_workers=1, multiprocessing_context='spawn')
    end_workers_with_their_parent(spawned)
    print('loaded', list(spawned), LEFT_OUT.summary())
"""


@pytest.mark.integration
def test_a_spawned_worker_loads_and_counts_where_posix_modules_are_missing(speech, tmp_path):
    """One for all kinds of loaders: it takes the ten seconds of importing NeMo."""
    (tmp_path / 'script.py').write_text(SPAWNED)
    paths = ':'.join(path for path in sys.path if path)
    with tarfile.open(tmp_path / 'audio_0.tar', 'w') as archive:
        for path in speech.glob('*.wav'):
            archive.add(path, path.name)
    (tmp_path / 'shar').mkdir()
    cuts = CutSet.from_cuts(Recording.from_file(path).to_cut() for path in speech.glob('*.wav'))
    cuts.to_shar(tmp_path / 'shar', fields={'recording': 'wav'}, shard_size=2)
    rows = (speech / 'm.json').read_text()
    (speech / 'more.json').write_text(rows + json.dumps({'audio_filepath': 'gone.wav', 'duration': 1.0}))
    data = speech / 'more.json', tmp_path / 'audio_0.tar', tmp_path / 'shar', speech / 'm.json'
    done = run_python(tmp_path / 'script.py', *data, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith('loaded [4, 4, 4] 2 utterances were left out')


def batches_of(speech, folder=None, ckpt_path=None, **settings):
    """Train six steps; returns what each step got."""
    seen = []
    record = LambdaCallback(
        on_train_batch_start=lambda run, model, batch, index: seen.append(float(batch.audio.sum()))
    )
    saves = [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename='{step}')] if folder else []
    run = trainer(6, callbacks=[record, *saves], enable_checkpointing=bool(folder), **settings)
    cfg = tiny_config('model.validate_contexts=null').model
    section = {'manifest_filepath': str(speech / 'm.json'), 'sample_rate': 16000, 'batch_size': 1, 'shuffle': True}
    with open_dict(cfg):
        cfg.train_ds = {**section, 'num_workers': 0, 'resumable': {'seed': 0}}
    run.fit(EncDecDenoiseMaskedTokenPredModel(cfg, run), ckpt_path=ckpt_path)
    return seen


def test_an_epoch_that_is_resumed_after_any_of_its_batches_has_the_others(speech, tmp_path):
    whole = batches_of(speech, tmp_path, limit_train_batches=3)
    for step in (1, 3, 4, 5):
        rest = batches_of(speech, ckpt_path=tmp_path / f'step={step}.ckpt', limit_train_batches=3)
        assert rest == whole[step:], step


def test_a_batch_to_overfit_is_the_same_in_each_epoch(speech):
    assert len({*batches_of(speech, overfit_batches=1)}) == 1


@pytest.mark.parametrize('sampler, warned', [(None, True), ('divided', False)])
def test_undivided_data_is_a_warning(warnings, sampler, warned):
    sampler = DistributedSampler(range(4), num_replicas=2, rank=0) if sampler else None
    loader = DataLoader(range(4), sampler=sampler)
    warn_of_undivided_data(SimpleNamespace(world_size=2, train_dataloader=loader))
    assert any('use_distributed_sampler' in message for message in warnings) == warned


def test_an_augmentor_that_is_null_is_none(speech):
    section = {'manifest_filepath': str(speech / 'm.json'), 'sample_rate': 16000, 'batch_size': 4, 'shuffle': False}
    model = tiny_model()
    model.setup_training_data(OmegaConf.create({**section, 'batch_augmentor': None, 'augmentor': None}))
    assert [len(batch.audio) for batch in model._train_dl] == [4]


@pytest.mark.parametrize('name, key', [('train_ds', 'train'), ('validation_ds', 'val')])
def test_data_without_a_length_need_a_limit(speech, name, key):
    cfg = tiny_config(name='nest_fast-conformer_streaming_lhotse_tiny')
    section = {'use_lhotse': True, 'manifest_filepath': str(speech / 'm.json'), 'sample_rate': 16000, 'batch_size': 2}
    OmegaConf.set_struct(cfg, False)
    cfg.model.train_ds, cfg.model.validation_ds = None, None
    cfg.model[name] = {**section, 'shuffle': True, 'num_workers': 0, 'force_iterable_dataset': True}
    with pytest.raises(ValueError, match=f'trainer.limit_{key}_batches is 1.0'):
        EncDecDenoiseMaskedTokenPredModel(cfg.model, trainer(1))


@pytest.mark.parametrize('second', ['second_', 'first_'])  # files in two folders may have the same name
def test_several_validation_sets_have_a_mean(second):
    model, run = tiny_model(), trainer(1)
    model._val_dl_idx = 0
    model._validation_names, model._validation_dl = ['first_', second], [batches(1), batches(2)]
    model.set_trainer(run)
    run.fit(model, train_dataloaders=batches(1), val_dataloaders=model._validation_dl)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    losses = [logged['val_loss'], logged[f'{second}val_loss']]
    assert logged['val_loss_mean'] == pytest.approx(sum(losses) / 2)
