# SPDX-License-Identifier: Apache-2.0
"""What ``init_from_*`` loads, reports and refuses."""

import pytest
import torch
import torch.distributed.checkpoint as distributed
from omegaconf import OmegaConf
from tiny_nest import STOCK_OFFLINE, tiny_model, trainer

from nemo.utils import logging, torch_files


@pytest.fixture(scope='module')
def first():
    return tiny_model(seed=1)


@pytest.fixture(scope='module')
def files(first, tmp_path_factory):
    """The same weights in each form."""
    folder = tmp_path_factory.mktemp('weights')
    first.save_to(str(folder / 'first.nemo'))
    run = trainer(1)
    first.set_trainer(run)
    run.strategy.connect(first)
    run.save_checkpoint(folder / 'first.ckpt')
    return {'init_from_nemo_model': folder / 'first.nemo', 'init_from_ptl_ckpt': folder / 'first.ckpt'}


def load(model, **cfg):
    model.maybe_init_from_pretrained_checkpoint(OmegaConf.create(cfg))
    return model


def share_of_encoder(model, other):
    pairs = zip(model.encoder.parameters(), other.encoder.parameters())
    same = [torch.equal(ours, theirs) for ours, theirs in pairs if ours.dim() > 1]
    return sum(same) / len(same)


@pytest.mark.parametrize('key', ['init_from_nemo_model', 'init_from_ptl_ckpt'])
def test_a_file_is_loaded_as_it_is_and_in_part(first, files, key, monkeypatch):
    monkeypatch.setenv('HOME', str(files[key].parent))
    assert share_of_encoder(load(tiny_model(), **{key: f'~/{files[key].name}'}), first) == 1
    assert share_of_encoder(load(tiny_model(), **{key: str(files[key])}), first) == 1
    source = {'path': str(files[key]), 'include': ['encoder'], 'exclude': ['pre_encode']}
    model = load(tiny_model(), **{key: {'mine': source}})
    assert 0.5 < share_of_encoder(model, first) < 1
    assert share_of_encoder(load(tiny_model(), **{key: {'mine': {**source, 'include': []}}}), first) < 0.5
    before = tiny_model().decoder.state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.decoder.state_dict().items())


def test_other_contexts_of_layers_are_a_warning(files, warnings):
    load(tiny_model(), init_from_nemo_model=str(files['init_from_nemo_model']))
    assert not any('layer_att_context_size' in message for message in warnings)
    contexts = '+model.encoder.layer_att_context_size=[[0,[7,0]]]'
    load(tiny_model(contexts), init_from_nemo_model=str(files['init_from_nemo_model']))
    assert any('layer_att_context_size' in message and '7' in message for message in warnings)


def test_a_published_model_is_loaded(first, files, monkeypatch):
    cls = type(first)
    monkeypatch.setattr(cls, 'from_pretrained', lambda *_, **__: cls.restore_from(str(files['init_from_nemo_model'])))
    assert share_of_encoder(load(tiny_model(), init_from_pretrained_model='published'), first) == 1


def test_the_log_has_a_table(files, monkeypatch):
    messages = []
    monkeypatch.setattr(logging, 'info', lambda message, *_, **__: messages.append(message))
    source = {'path': str(files['init_from_ptl_ckpt']), 'include': ['encoder'], 'exclude': ['pre_encode.out']}
    load(tiny_model(), init_from_ptl_ckpt={'mine': source})
    rows = {row.split()[0]: row.split()[1:] for message in messages for row in message.splitlines() if ' of ' in row}
    encoder = len(tiny_model().encoder.state_dict())
    assert rows['encoder'] == [str(encoder - 2), 'of', str(encoder), '2', '0', '0']
    assert rows['decoder'][:3] == ['0', 'of', rows['decoder'][3]]


@pytest.mark.parametrize(
    'options, message',
    [
        ({'include': ['encodr']}, "include: no tensor .* 'encodr'; did you mean encoder"),
        ({'include': ['encoder', 'quantiser']}, "'quantiser'; did you mean quantizer"),
        ({'exclude': ['joint']}, "exclude: no tensor .* 'joint'"),
        ({'exclude': ['encoder']}, '0 of .* encoder tensors'),
        ({'include': ['decoder']}, '0 of .* encoder tensors'),
        ({'includ': ['encoder']}, 'includ is not known; did you mean include'),
        ({'include': [3]}, r'include is \[3\]'),
        ({'exclude': 3}, 'exclude is 3'),
        ({'path': None}, 'path is None'),
        ({'path': 'nowhere.ckpt'}, r'mine.path: nowhere.ckpt cannot be read .* No such file'),
    ],
)
def test_what_would_load_less_than_is_meant_is_an_error(files, options, message):
    source = {'path': str(files['init_from_ptl_ckpt']), **options}
    with pytest.raises(ValueError, match=message):
        load(tiny_model(), init_from_ptl_ckpt={'mine': source})


@pytest.mark.parametrize(
    'cfg, message',
    [
        ({'init_from_ptl_ckpt': 'a.ckpt', 'init_from_nemo_model': 'a.nemo'}, 'both set'),
        ({'init_from_ptl_ckpt': 3}, 'init_from_ptl_ckpt is 3'),
        ({'init_from_ptl_ckpt': {}}, 'init_from_ptl_ckpt is {}'),
        ({'init_from_nemo': 'a.nemo'}, 'init_from_nemo is not known; did you mean init_from_nemo_model'),
        ({'init_from_ptl_ckpt': {'mine': 'a.ckpt'}}, 'init_from_ptl_ckpt.mine is'),
        ({'init_from_ptl_ckpt': 'NEMO'}, 'init_from_ptl_ckpt: .*first.nemo cannot be read as a checkpoint'),
        ({'init_from_ptl_ckpt': 'NEMO'}, '; for such a file set init_from_nemo_model'),
        (
            {'init_from_nemo_model': 'CKPT'},
            'init_from_nemo_model: .*first.ckpt.*; for such a file set init_from_ptl_ckpt',
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_an_error(files, cfg, message):
    named = {'NEMO': str(files['init_from_nemo_model']), 'CKPT': str(files['init_from_ptl_ckpt'])}
    cfg = {key: named.get(value, value) if isinstance(value, str) else value for key, value in cfg.items()}
    with pytest.raises(ValueError, match=message):
        load(tiny_model(), **cfg)


def test_an_offline_checkpoint_names_what_differs_and_the_tool(tmp_path):
    tiny_model(*STOCK_OFFLINE).save_to(str(tmp_path / 'offline.nemo'))
    with pytest.raises(ValueError) as error:
        load(tiny_model(), init_from_nemo_model=str(tmp_path / 'offline.nemo'))
    for words in ('causal_downsampling is False in the file and True', 'conv_norm_type is batch_norm in the file'):
        assert words in str(error.value)
    assert 'convert_to_streaming.py' in str(error.value)


def test_a_folder_of_sharded_weights_is_loaded(first, tmp_path):
    distributed.save({'state_dict': first.state_dict()}, checkpoint_id=str(tmp_path / 'sharded.ckpt'))
    meta = {'hyper_parameters': {'cfg': OmegaConf.to_container(first.cfg)}}  # as ShardedTrainingMixin writes it
    torch.save(meta, tmp_path / 'sharded.ckpt/meta.pt')
    assert share_of_encoder(load(tiny_model(), init_from_ptl_ckpt=str(tmp_path / 'sharded.ckpt')), first) == 1


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({'state_dict': {'a': torch.ones(2)}, 'callbacks': Marker(tmp_path / 'ran')}, tmp_path / 'a.ckpt')
    assert torch.equal(torch_files.load(tmp_path / 'a.ckpt')['state_dict']['a'], torch.ones(2))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content', [b'', b'no checkpoint'])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    (tmp_path / 'a.ckpt').write_bytes(content)
    with pytest.raises(ValueError, match='init_from_ptl_ckpt: .*a.ckpt cannot be read'):
        load(tiny_model(), init_from_ptl_ckpt=str(tmp_path / 'a.ckpt'))
