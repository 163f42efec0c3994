# SPDX-License-Identifier: Apache-2.0
"""What a recogniser hears, at once and live."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tiny_nest import tiny_config

from nemo.collections.asr.models import EncDecCTCModel


@pytest.fixture(scope='module')
def scoring(load):
    return load('scoring')


@pytest.fixture(scope='module')
def model(load):
    """A recogniser of phones that knows nothing, and says much: no class is likelier than another on the whole."""
    characters = list(load('phones').CHARACTERS)
    contexts = [list(context) for context in load('settings').CONTEXTS]
    cfg = tiny_config(f'model.encoder.att_context_size={contexts}', 'model.encoder.n_layers=2').model
    decoder = {'_target_': 'nemo.collections.asr.modules.ConvASRDecoder', 'feat_in': 16}
    decoder.update(num_classes=len(characters), vocabulary=characters)
    torch.manual_seed(0)
    made = {'preprocessor': cfg.preprocessor, 'encoder': cfg.encoder, 'decoder': decoder, 'labels': characters}
    model = EncDecCTCModel(OmegaConf.create(made)).eval()
    model.preprocessor.featurizer.dither = 0.0
    with torch.no_grad():
        noise = 0.1 * torch.randn(1, 32000)
        features, length = model.preprocessor(input_signal=noise, length=torch.tensor([32000]))
        encoded = model.encoder(audio_signal=features, length=length)[0]
        layer = model.decoder.decoder_layers[0]
        layer.bias.copy_(-layer.weight[:, :, 0] @ encoded.mean(dim=(0, 2)))
    return model


@pytest.fixture(scope='module')
def entries(load, make_manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp('spoken')
    manifest = make_manifest(folder / 'raw', ['x', 'y', 'z'], [1.5, 1.3], phones='AH B K IY')
    return load('data').write_joined([manifest], folder, 'test', 2.0)


def test_live_phones_are_those_heard_at_once_in_every_context(scoring, model, entries):
    found = scoring.score(model, entries)
    assert all(len(text) > 5 for texts in found['heard'].values() for text in texts)
    assert len({tuple(texts) for texts in found['heard'].values()}) > 1  # contexts bite
    live = scoring.score_live(model, entries, found, 2)
    assert live['utterances'] == [0, 1]
    for label, of in live['contexts'].items():
        assert of['same_texts'] == 2, label
        assert of['errors'] == of['errors_offline'] == sum(found['errors'][label][:2]) > 0


def test_a_recogniser_of_something_else_is_refused(scoring, model, tmp_path, monkeypatch):
    path = tmp_path / 'model.nemo'
    model.save_to(str(path))
    assert list(scoring.restore(path).decoder.vocabulary) == list(model.decoder.vocabulary)
    other = torch.nn.Module()
    other.decoder = SimpleNamespace(vocabulary=['a', 'b'])
    monkeypatch.setattr(scoring.EncDecCTCModel, 'restore_from', lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match=r"model.nemo recognises \['a', 'b'\]; it must be"):
        scoring.restore(path)
