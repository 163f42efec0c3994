# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from tiny_nest import batches, fit, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

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


@pytest.fixture(scope='module')
def script(load_example):
    return load_example('convert_to_streaming')


@pytest.fixture(scope='module')
def offline():
    """A tiny offline NEST model whose norms have seen data."""
    model = tiny_model(*OFFLINE)
    fit(model, batches(3), max_steps=3)
    return model.eval()


@pytest.fixture(scope='module')
def files(script, offline, tmp_path_factory):
    """A folder with the model, offline.nemo, and with what the script makes of it, streaming.nemo."""
    folder = tmp_path_factory.mktemp('converted')
    offline.save_to(str(folder / 'offline.nemo'))
    (folder / 'stats.yaml').write_text(f'fixed_mean: {[-8.0] * 80}\nfixed_std: {[4.0] * 80}\n')
    options = ['--stats', str(folder / 'stats.yaml'), '--contexts', '[[10, 0], [4, 0]]']
    assert convert(script, folder / 'offline.nemo', folder / 'streaming.nemo', *options) == 0
    return folder


def convert(script, source, output, *options):
    return script.main(['--model', str(source), '--output', str(output), *options])


def restored(path):
    return EncDecDenoiseMaskedTokenPredModel.restore_from(str(path), map_location='cpu').eval()


def test_weights_that_fit_are_carried_over_and_the_rest_is_listed(script, offline):
    streaming = script.build(script.streaming_config(offline.cfg, [[10, 0]], 'regular', None))
    results = script.convert_weights(offline, streaming)
    old, new = offline.state_dict(), streaming.state_dict()
    assert all(torch.equal(old[name], new[name]) for name, result in results.items() if result == script.KEPT)
    others = {name: result.partition(':')[0] for name, result in results.items() if result != script.KEPT}
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    left_out = {f'encoder.layers.0.conv.batch_norm.{name}': 'left out' for name in statistics}
    assert others == {'encoder.pre_encode.out.weight': 'moved', **left_out}
    assert results.keys() - left_out.keys() == new.keys()


def test_contexts_with_look_ahead_are_streamed_and_compared_with_offline(script, files, tmp_path, capsys):
    contexts = [[28, 13], [28, 6], [28, 1], [28, 0], [-1, -1]]
    options = ['--contexts', str(contexts), '--style', 'chunked_limited']
    assert convert(script, files / 'offline.nemo', tmp_path / 'chunks.nemo', *options) == 0
    out = capsys.readouterr().out
    assert float(re.search('streamed against offline: (.*)', out)[1]) < 1e-4
    look_ahead = re.findall('look-ahead (.*)', out)
    assert look_ahead == ['1040 ms', '480 ms', '80 ms', '0 ms', 'all']
    assert restored(tmp_path / 'chunks.nemo').encoder.att_context_size_all == contexts
    assert restored(files / 'streaming.nemo').cfg.preprocessor.normalize.fixed_mean[0] == -8.0


@torch.no_grad()
def test_the_tokens_stay_the_same(offline, files):
    features = offline.preprocessor(input_signal=torch.randn(1, 16000), length=torch.tensor([16000]))
    expected, _ = offline.targets.of(*features)
    found, _ = restored(files / 'streaming.nemo').targets.of(*features)
    assert (expected == found).float().mean() > 0.98  # normalising twice rounds twice


@torch.no_grad()
def test_subsampled_frames_are_near_the_offline_ones_of_a_frame_before(offline, files):
    """The weights move by a bin as the frames do, see ``decoder_offset``."""
    smooth = torch.randn(1, 94, 1614, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(smooth, 15, stride=1).transpose(1, 2)  # [1, 1600, 80]
    lengths = torch.tensor([1600])
    frames, _ = offline.encoder.pre_encode(x=smooth, lengths=lengths)
    causal, _ = restored(files / 'streaming.nemo').encoder.pre_encode(x=smooth, lengths=lengths)
    distances = [(frames[0, 5:150] - causal[0, 5 + shift : 150 + shift]).norm() for shift in range(3)]
    assert distances[1] == min(distances)


def test_the_result_trains(files):
    model = restored(files / 'streaming.nemo')
    before = model.encoder.layers[0].feed_forward1.linear1.weight.clone()
    run = fit(model, batches(2), max_steps=2)
    assert torch.tensor(run.logger.column('train_loss')).isfinite().all()
    assert not torch.equal(before, model.encoder.layers[0].feed_forward1.linear1.weight)


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('encoder.self_attention_model', 'rel_pos_local_attn', 'model.encoder.self_attention_model'),
        ('encoder.subsampling', 'vggnet', 'model.encoder.subsampling'),
        ('encoder.reduction', 'pooling', 'model.encoder.reduction'),
        ('mask_position', 'post_conv', 'model.mask_position'),
        ('target', 'nemo.collections.asr.models.ctc_models.EncDecCTCModel', 'EncDecCTCModel'),
        ('encoder._target_', 'nemo.collections.asr.modules.SqueezeformerEncoder', 'must be ConformerEncoder'),
    ],
)
def test_a_model_that_cannot_stream_is_refused(script, offline, key, value, message):
    cfg = offline.cfg.copy()
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value)
    with pytest.raises(ValueError, match=message):
        script.check_convertible(cfg)


@pytest.mark.parametrize(
    'source, output, options, message',
    [
        ('streaming.nemo', 'new.nemo', [], 'streams already'),
        ('offline.nemo', 'streaming.nemo', [], '--overwrite'),
        ('offline.nemo', 'offline.nemo', ['--overwrite'], 'offline.nemo is there already'),
        ('stats.yaml', 'new.nemo', [], 'stats.yaml is truncated, corrupt or no .nemo file'),
        ('none.nemo', 'new.nemo', [], 'none.nemo'),
        *(('offline.nemo', 'new.nemo', ['--contexts', text], '--contexts') for text in ('[[10, 0', '{}', '[[-3, 0]]')),
    ],
)
def test_a_run_that_fails_leaves_the_files_as_they_were(script, files, capsys, source, output, options, message):
    before = {path.name: path.stat().st_mtime_ns for path in files.iterdir()}
    assert convert(script, files / source, files / output, *options) == 2
    assert message in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in files.iterdir()}
