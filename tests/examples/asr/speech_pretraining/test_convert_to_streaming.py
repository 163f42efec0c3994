# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
import torch
from omegaconf import open_dict
from tiny_nest import batches, fit, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.att_context import StreamingSession

OFFLINE = [
    'model.preprocessor.normalize=per_feature',
    'model.encoder.causal_downsampling=false',
    'model.encoder.conv_context_size=null',
    'model.encoder.conv_norm_type=batch_norm',
    'model.encoder.att_context_size=[-1,-1]',
    'model.target_normalize=null',
    'model.masking.causal=false',
    'model.loss.decoder_offset=0',
]


@pytest.fixture(scope='session')
def script(load_example):
    return load_example('convert_to_streaming')


@pytest.fixture(scope='session')
def offline():
    """A tiny offline NEST model whose norms have seen data."""
    model = tiny_model(*OFFLINE)
    fit(model, batches(3), max_steps=3)
    return model.eval()


@pytest.fixture(scope='session')
def offline_file(offline, tmp_path_factory):
    path = tmp_path_factory.mktemp('offline') / 'offline.nemo'
    offline.save_to(str(path))
    return path


@pytest.fixture(scope='session')
def statistics_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('statistics') / 'stats.yaml'
    path.write_text(f'fixed_mean: {[-8.0] * 80}\nfixed_std: {[4.0] * 80}\n')
    return path


@pytest.fixture(scope='session')
def converted(script, offline_file, statistics_file):
    path = offline_file.with_name('streaming.nemo')
    status = script.main(
        [
            *('--model', str(offline_file), '--output', str(path), '--stats', str(statistics_file)),
            *('--contexts', '[[10, 0], [4, 0]]'),
        ]
    )
    assert status == 0
    return path


def restored(path):
    return EncDecDenoiseMaskedTokenPredModel.restore_from(str(path), map_location='cpu').eval()


@torch.no_grad()
def test_the_result_streams_equal_to_offline(converted):
    model = restored(converted)
    samples = torch.randn(1, 20000)
    for context in [[10, 0], [4, 0]]:
        session = StreamingSession(model, att_context_size=context)
        pieces = [session.step(piece).encoded for piece in samples.split(777, dim=1)] + [session.finish().encoded]
        with model.encoder.using_att_context_size(context):
            features, lengths = model.preprocessor(input_signal=samples, length=torch.tensor([20000]))
            encoded, lengths = model.encoder(audio_signal=features, length=lengths)
        assert torch.allclose(torch.cat(pieces, dim=2), encoded[:, :, : int(lengths)], atol=1e-4)


def test_what_fits_is_carried_over_and_the_rest_is_listed(script, offline):
    streaming = script.build(script.streaming_config(offline.cfg, [[10, 0]], 'regular', None))
    result = script.carry_over(offline, streaming)
    old, new = offline.state_dict(), streaming.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in result.as_they_are)
    norm = 'encoder.layers.0.conv.batch_norm'
    assert set(result.dropped) == {f'{norm}.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert {f'{norm}.weight', f'{norm}.bias', 'decoder.decoder_layers.0.weight'} & set(result.as_they_are)
    assert not result.fresh and set(result.moved) == {'encoder.pre_encode.out.weight'}
    assert set(result.as_they_are) | set(result.moved) == set(new)
    for word in ('carried over', 'moved: encoder.pre_encode.out.weight', 'dropped: encoder.layers.0'):
        assert word in str(result)


def test_contexts_with_look_ahead_stream_equal_to_offline_and_their_latency_is_told(
    script, offline_file, tmp_path, capsys
):
    """``main`` itself streams each context and compares it with offline."""
    path = tmp_path / 'chunks.nemo'
    contexts = ('--contexts', '[[28,13],[28,6],[28,1],[28,0],[-1,-1]]', '--style', 'chunked_limited')
    assert script.main(['--model', str(offline_file), '--output', str(path), *contexts]) == 0
    out = capsys.readouterr().out
    assert float(re.search('streamed against offline: (.*)', out)[1]) < 1e-4
    told = re.findall(r'context (.*), look-ahead (.*)', out)
    expected = [('[28, 13]', '1040 ms'), ('[28, 6]', '480 ms'), ('[28, 1]', '80 ms'), ('[28, 0]', '0 ms')]
    assert told == [*expected, ('[-1, -1]', 'all')]
    assert restored(path).encoder.att_context_size_all == [[28, 13], [28, 6], [28, 1], [28, 0], [-1, -1]]


@torch.no_grad()
def test_the_tokens_stay_what_they_were(offline, converted):
    features = offline.preprocessor(input_signal=torch.randn(1, 16000), length=torch.tensor([16000]))
    mean, std = features[0].mean(), features[0].std()  # already normalised per utterance
    assert abs(mean) < 0.1 and abs(std - 1) < 0.1
    expected, _ = offline.targets.of(*features)
    found, _ = restored(converted).targets.of(*features)
    assert (expected == found).float().mean() > 0.98  # normalising twice rounds twice


@torch.no_grad()
def test_subsampled_frames_are_near_the_offline_ones_of_a_frame_before(offline, converted):
    """The weights move by a bin as the frames do, see ``decoder_offset``."""
    smooth = torch.randn(1, 94, 1614, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(smooth, 15, stride=1).transpose(1, 2)  # [1, 1600, 80]
    lengths = torch.tensor([1600])
    frames, _ = offline.encoder.pre_encode(x=smooth, lengths=lengths)
    causal, _ = restored(converted).encoder.pre_encode(x=smooth, lengths=lengths)
    distances = [(frames[0, 5:150] - causal[0, 5 + shift : 150 + shift]).norm() for shift in range(3)]
    assert distances[1] == min(distances)


def test_the_result_trains(converted):
    model = restored(converted)
    before = model.encoder.layers[0].feed_forward1.linear1.weight.clone()
    run = fit(model, batches(2), max_steps=2)
    assert all(torch.isfinite(torch.tensor(run.logger.column('train_loss'))))
    assert not torch.equal(before, model.encoder.layers[0].feed_forward1.linear1.weight)


def test_the_config_keeps_the_data_and_gets_the_statistics(script, offline, converted):
    assert restored(converted).cfg.preprocessor.normalize.fixed_mean[0] == -8.0
    cfg = offline.cfg.copy()
    with open_dict(cfg):
        cfg.train_ds = {'manifest_filepath': 'elsewhere.json'}
    model = script.build(script.streaming_config(cfg, [[10, 0]], 'regular', None))
    assert model.cfg.train_ds.manifest_filepath == 'elsewhere.json' and model.cfg.preprocessor.normalize == 'NA'


def test_never_overwrites_unasked(script, offline_file, converted, capsys):
    arguments = ['--model', str(offline_file), '--contexts', '[6, 0]']
    before = converted.read_bytes()
    assert script.main([*arguments, '--output', str(converted)]) == 2
    assert '--overwrite' in capsys.readouterr().err and converted.read_bytes() == before
    assert script.main([*arguments, '--output', str(offline_file), '--overwrite']) == 2  # its own source


@pytest.mark.parametrize(
    'change, words',
    [
        ({'encoder.self_attention_model': 'rel_pos_local_attn'}, 'model.encoder.self_attention_model is'),
        ({'encoder.subsampling': 'vggnet'}, 'model.encoder.subsampling is'),
        ({'encoder.reduction': 'pooling'}, 'model.encoder.reduction is'),
        ({'mask_position': 'post_conv'}, 'model.mask_position is'),
        ({'target': 'nemo.collections.asr.models.ctc_models.EncDecCTCModel'}, 'it is a EncDecCTCModel'),
        ({'encoder._target_': 'nemo.collections.asr.modules.SqueezeformerEncoder'}, 'must be ConformerEncoder'),
    ],
)
def test_refuses_what_cannot_stream(script, offline, change, words):
    cfg = offline.cfg.copy()
    with open_dict(cfg):
        for key, value in change.items():
            section, _, name = key.rpartition('.')
            (cfg[section] if section else cfg)[name] = value
    with pytest.raises(ValueError, match=words):
        script.check_convertible(cfg)


def test_refuses_a_model_that_streams(script, converted, tmp_path, capsys):
    assert script.main(['--model', str(converted), '--output', str(tmp_path / 'again.nemo')]) == 2
    assert 'streams already' in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('contexts', ['[[10, 0', '{}', '[[10]]', '[[-3, 0]]', '"low"'])
def test_names_a_bad_context(script, offline_file, tmp_path, contexts, capsys):
    arguments = ['--model', str(offline_file), '--output', str(tmp_path / 'x.nemo'), '--contexts', contexts]
    assert script.main(arguments) == 2
    assert '--contexts' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_names_a_file_that_is_no_model(script, tmp_path, capsys):
    (tmp_path / 'junk.nemo').write_bytes(json.dumps({'no': 'model'}).encode())
    assert script.main(['--model', str(tmp_path / 'junk.nemo'), '--output', str(tmp_path / 'x.nemo')]) == 2
    assert 'junk.nemo is truncated, corrupt or no .nemo file' in capsys.readouterr().err
    assert script.main(['--model', str(tmp_path / 'none.nemo'), '--output', str(tmp_path / 'x.nemo')]) == 2
    assert 'none.nemo: there is no such file' in capsys.readouterr().err
