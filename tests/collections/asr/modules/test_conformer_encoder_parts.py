# SPDX-License-Identifier: Apache-2.0
"""What NeMo builds on an encoder: features of several layers, and adapters; with contexts of the layers' own."""

import pytest
import torch
from tiny_encoder import TINY_ENCODER, WITHOUT_DROPOUT, with_adapter
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.modules.conformer_encoder import (
    ConformerEncoder,
    ConformerEncoderAdapter,
    ConformerMultiLayerFeatureExtractor,
)
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.submodules.adapters import multi_head_attention_adapter_module as adapters
from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig

WIDTH = 16
ADAPTER = f'model.encoder._target_={ConformerEncoderAdapter.__module__}.ConformerEncoderAdapter'
SETTINGS = {
    **TINY_ENCODER,
    **WITHOUT_DROPOUT,
    'feat_in': 80,
    'n_layers': 3,
    'att_context_size': [8, 0],
    'layer_att_context_size': [[2, 0], [4, 0], [8, 0]],
}
FEATURES, LENGTHS = torch.randn(2, 80, 240, generator=torch.Generator().manual_seed(0)), torch.tensor([240, 100])


def make_encoder(cls=ConformerEncoder):
    torch.manual_seed(0)
    return cls(**SETTINGS).eval()


def run(encoder):
    with torch.no_grad():
        return encoder(audio_signal=FEATURES, length=LENGTHS)[0]


def test_features_of_several_layers_are_their_outputs_within_their_contexts():
    encoder, outputs = make_encoder(), []
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in encoder.layers]
    run(encoder)
    for hook in hooks:
        hook.remove()
    extractor = ConformerMultiLayerFeatureExtractor(encoder, [0, 2])
    with torch.no_grad():
        features, lengths = extractor(FEATURES, LENGTHS)
        assert torch.equal(features[0], outputs[0].transpose(1, 2))
        assert torch.equal(features[1], outputs[2].transpose(1, 2))
        assert torch.equal(lengths[0], encoder(audio_signal=FEATURES, length=LENGTHS)[1])
        encoder.set_layer_att_context_size(None)
        assert not torch.allclose(extractor(FEATURES, LENGTHS)[0][0], features[0], atol=1e-4)


def linear():
    return LinearAdapterConfig(in_features=WIDTH, dim=4)


def attention():
    return adapters.RelPositionMultiHeadAttentionAdapterConfig(n_head=2, n_feat=WIDTH)


class TestAdapters:
    @pytest.mark.parametrize('adapter', [linear, attention])
    def test_an_adapter_attends_no_further_than_its_layer(self, adapter):
        encoder = with_adapter(make_encoder(ConformerEncoderAdapter), adapter())
        encoder.set_layer_att_context_size([[1, 0]] * 3)
        before = run(encoder)
        assert not torch.allclose(before, run(make_encoder(ConformerEncoderAdapter)), atol=1e-3)
        changed = FEATURES.clone()
        changed[:, :, :16] += 3.0  # attention frames 0 ... 3: those that see one of the features 0 ... 15
        with torch.no_grad():
            after = encoder(audio_signal=changed, length=LENGTHS)[0]
        # a layer sees one frame back by attention, one more by its adapter's, and two by its convolution
        reach = 3 + 3 * (1 + 2 + (adapter is attention))
        differs = (before - after).abs().amax(dim=(0, 1)) > 0
        assert differs[:4].any() and not differs[reach + 1 :].any() and reach + 1 < len(differs)

    @pytest.mark.parametrize('adapter', [linear, attention])
    def test_only_the_adapter_learns_and_a_saved_model_streams_with_it(self, adapter, tmp_path):
        settings = (
            ADAPTER,
            'model.encoder.att_context_size=[8,0]',
            '+model.encoder.layer_att_context_size=[[2,0],[8,0]]',
        )
        model = with_adapter(tiny_recogniser('ctc', *settings), adapter())
        model.freeze()
        model.unfreeze_enabled_adapters()
        model.train()
        model.encoder(audio_signal=FEATURES, length=LENGTHS)[0].sum().backward()
        learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert learning and all('adapter_layer' in name for name in learning)
        model.save_to(str(tmp_path / 'adapted.nemo'))
        restored = type(model).restore_from(str(tmp_path / 'adapted.nemo'), map_location='cpu').eval()
        assert restored.encoder.get_enabled_adapters() == ['added']
        torch.testing.assert_close(run(restored.encoder), run(model.eval().encoder), atol=0, rtol=0)
        if adapter is linear:
            check_stream(restored)
            return
        with pytest.raises(ValueError, match=r'layers.0 has a RelPositionMultiHeadAttentionAdapter'):
            StreamingSession(restored)
        restored.encoder.set_enabled_adapters('added', enabled=False)
        check_stream(restored)


def check_stream(model):
    samples = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        offline, (frames,), _ = model(input_signal=samples, input_signal_length=torch.tensor([16000]))
    session = StreamingSession(model, return_log_probs=True)
    outputs = [session.step(piece) for piece in samples.split(1500, dim=1)] + [session.finish()]
    streamed = torch.cat([output.log_probs for output in outputs], dim=1)
    torch.testing.assert_close(streamed, offline[:, :frames], atol=1e-4, rtol=0)
