# SPDX-License-Identifier: Apache-2.0
"""What is shown on a real GPU, where there is one; everything here runs on the CPU, too, or on a device that is not there.

The tests that are marked for a GPU have a twin: the same test with ``cpu``, or the same scenario in
``test_scenarios.py``.
"""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from device.model_scenarios import OBJECTIVES, PLAIN, batch_at, model_at
from device.module_scenarios import ENCODERS
from device.place import Place
from device.run_scenarios import SCENARIOS, TOLERANCE, run
from live_streams import noise, stream
from ranks import run_on_two_ranks
from tiny_encoder import WITHOUT_DROPOUT, tiny_encoder
from tiny_nest import POST_CONV, batches, fit, noise_batch, tiny_model

from nemo.collections.asr.losses import MLMLoss
from nemo.collections.asr.modules import RandomBlockMasking, RandomProjectionVectorQuantizer
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.utils.nonfinite_guard import gradient_norm

ON_GPU = pytest.mark.run_only_on('GPU')
DEVICES = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=ON_GPU)])
DRAWS = (
    'masking',
    'model',
    'training',
    'validation',
    'contrastive',
    'run of',
    'live streams, m',
)  # on each device others
WITHOUT_DRAWS = [scenario for scenario in SCENARIOS if not scenario.startswith(DRAWS)]
STEPS = {**OBJECTIVES, 'masked, post_conv': POST_CONV, 'masked, by blocks': ('model.encoder.blockwise_attention=on',)}
TRAINS = [scenario for scenario in SCENARIOS if scenario.startswith(('masking', 'model', 'training', 'validation'))]


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)  # it has 10 bits, and is on by default


def with_masks_of_the_cpu(model):
    """Let a model draw its masks on the CPU, the same whatever device it is on."""
    masking = model.mask_processor
    draw = masking.draw
    masking.draw = lambda lengths, *args, **kwargs: draw(lengths.cpu(), *args, **kwargs).to(lengths.device)
    return model


class TestScenarios:
    """Their twins are in test_scenarios.py, on a device that is not there."""

    @ON_GPU
    @pytest.mark.integration
    @pytest.mark.parametrize('scenario', WITHOUT_DRAWS)
    def test_a_gpu_computes_what_the_cpu_does(self, scenario):
        expected, found = (run(scenario, Place(torch.device(device))) for device in ('cpu', 'cuda'))
        assert found['error'] is None, found['error']
        torch.testing.assert_close(found['values'], expected['values'], rtol=1e-2, atol=1e-3, check_dtype=False)

    @ON_GPU
    @pytest.mark.integration
    @pytest.mark.parametrize('precision', ['float32', 'autocast float16', 'autocast bfloat16'])
    @pytest.mark.parametrize('scenario', TRAINS)
    def test_a_gpu_masks_trains_and_validates(self, scenario, precision):
        found = run(scenario, Place(torch.device('cuda'), precision))
        assert found['error'] is None, found['error']
        assert all(value.isfinite().all() for value in found['values'] if value.is_floating_point())


class TestDesignNotes:
    """The tests that the design notes of the fork ask for, as they write them."""

    @DEVICES
    def test_masking_in_half_precision(self, device):
        masking = RandomBlockMasking(feat_in=80, causal=True, left_context_size=10).to(device)
        features = torch.randn(4, 80, 400, device=device).half()
        masked, masks = masking(input_feats=features, input_lengths=torch.tensor([400, 380, 200, 100], device=device))
        assert masked.device.type == masks.device.type == device
        assert masked.dtype == masks.dtype == torch.float16 and masks.any()

    @DEVICES
    @pytest.mark.parametrize('as_tensor', [False, True])
    def test_masking_of_the_last_frames_received(self, device, as_tensor):
        masking = RandomBlockMasking(feat_in=80, block_size=8, mask_prob=0.5).to(device)
        features, lengths = torch.randn(2, 80, 100, device=device), torch.tensor([100, 90], device=device)
        current = torch.tensor([50, 50], device=device) if as_tensor else 50
        _, masks = masking(
            input_feats=features, input_lengths=lengths, current_frame=current, effective_left_context=20
        )
        assert masks[:, :, 30:50].any() and not masks[:, :, 50:].any() and not masks[:, :, :30].any()

    @DEVICES
    def test_a_module_that_was_not_moved_masks_all_the_same(self, device):
        masking = RandomBlockMasking(feat_in=8, block_size=8)
        features = torch.randn(2, 8, 100, device=device)
        masked, masks = masking(input_feats=features, input_lengths=torch.tensor([100, 60]))
        assert masked.device.type == device and masks[0].any() and not masks[1, :, 60:].any()


class TestLossAndTargets:
    @DEVICES
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
    def test_the_loss_is_that_of_double_precision(self, device, dtype):
        log_probs = torch.randn(4, 21, 32).log_softmax(-1).to(dtype)
        targets, masks = torch.randint(32, (4, 20)), (torch.rand(4, 1, 160) < 0.5).float().expand(-1, 8, -1)
        loss = MLMLoss(combine_time_steps=8, mask_threshold=0.3, decoder_offset=1)
        lengths = torch.tensor([21, 15, 9, 1])
        named = dict(decoder_outputs=log_probs, targets=targets, masks=masks, decoder_lengths=lengths)
        expected = loss(**{**named, 'decoder_outputs': log_probs.double()})
        found = loss(**{name: value.to(device) for name, value in named.items()})
        assert found.device.type == device and found.item() == pytest.approx(expected.item(), rel=1e-4)

    @DEVICES
    def test_nothing_masked_is_a_loss_of_zero_with_a_gradient(self, device):
        log_probs = torch.zeros(2, 10, 4, device=device, requires_grad=True)
        loss = MLMLoss()(
            decoder_outputs=log_probs,
            targets=torch.zeros(2, 10, dtype=torch.long, device=device),
            masks=torch.zeros(2, 8, 10, device=device),
        )
        loss.backward()
        assert loss.item() == 0 and not log_probs.grad.any()

    @DEVICES
    @pytest.mark.parametrize('distance', ['l2', 'cosine'])
    def test_the_tokens_are_those_of_the_cpu(self, device, distance):
        module = RandomProjectionVectorQuantizer(80, 16, 512, 1, dist_fn=distance, combine_time_steps=8).eval()
        features = torch.randn(2, 80, 400)
        (_, expected), (_, found) = (
            copy.deepcopy(module).to(place)(input_signal=features.to(place)) for place in ('cpu', device)
        )
        assert (found.cpu() == expected).float().mean() > 0.99  # two codes may be as near as each other

    @DEVICES
    @pytest.mark.parametrize('bad', [float('nan'), float('inf')])
    def test_bad_gradients_are_seen(self, device, bad):
        weights = [torch.nn.Parameter(torch.ones(3, 2, device=device)) for _ in range(3)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        assert gradient_norm(weights) == pytest.approx(18**0.5)
        weights[1].grad[0, 0] = bad
        assert not math.isfinite(gradient_norm(weights))


class TestAttention:
    @DEVICES
    @pytest.mark.parametrize('kind', ['regular', 'regular, SDPA', 'chunked', 'contexts by layer', 'abs_pos'])
    def test_blocks_give_stocks_outputs_and_gradients(self, device, kind):
        encoder = tiny_encoder(n_layers=2, **{**WITHOUT_DROPOUT, **ENCODERS[kind]}).to(device).train()
        features, lengths = torch.randn(2, 8, 400, device=device), torch.tensor([400, 250], device=device)
        results = []
        for choice in ('off', 'on'):
            encoder.blockwise_attention = choice
            encoder.zero_grad()
            encoded, _ = encoder(audio_signal=features, length=lengths)
            encoded[0].square().mean().backward()
            gradients = [weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None]
            results.append([encoded[0].detach(), *gradients])
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)

    @DEVICES
    @pytest.mark.integration
    def test_a_compiled_encoder_gives_the_same(self, device):
        encoder = tiny_encoder(n_layers=2, **ENCODERS['regular']).to(device)
        features, lengths = torch.randn(2, 8, 160, device=device), torch.tensor([160, 90], device=device)
        expected, _ = encoder(audio_signal=features, length=lengths)
        torch._dynamo.reset()
        compiled = torch.compile(encoder, backend='inductor' if device == 'cuda' else 'aot_eager', dynamic=False)
        torch.testing.assert_close(compiled(audio_signal=features, length=lengths)[0], expected, rtol=1e-3, atol=1e-4)


class TestTraining:
    @DEVICES
    @pytest.mark.integration
    @pytest.mark.parametrize('kind', STEPS)
    def test_a_step_is_that_of_the_cpu(self, device, kind):
        losses, gradients = [], []
        for place in (Place(torch.device('cpu')), Place(torch.device(device))):
            model = with_masks_of_the_cpu(model_at(place, *STEPS[kind]).train())
            model._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            torch.manual_seed(3)
            loss = model.training_step(batch_at(place), 0)['loss']
            loss.backward()
            losses.append(loss.item())
            own = [weight.grad.flatten().cpu() for weight in model.parameters() if weight.grad is not None]
            gradients.append(torch.cat(own))
        assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0] > 0
        assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999

    @DEVICES
    @pytest.mark.integration
    @pytest.mark.parametrize('precision', ['bf16-mixed', '16-mixed'])
    def test_training_in_mixed_precision_is_that_of_the_cpu_in_full(self, device, precision):
        full = fit(self.model(), batches(3), 3)
        accelerator = 'gpu' if device == 'cuda' else 'cpu'
        mixed = fit(self.model(), batches(3), 3, precision=precision, accelerator=accelerator)
        losses = mixed.logger.column('train_loss')
        assert len(losses) == 3 and losses == pytest.approx(full.logger.column('train_loss'), rel=0.05)

    @staticmethod
    def model():
        torch.manual_seed(0)
        return with_masks_of_the_cpu(tiny_model(*PLAIN))

    @DEVICES
    @pytest.mark.integration
    def test_a_compiled_step_is_the_plain_one(self, device):
        losses = []
        for backend in (None, 'inductor' if device == 'cuda' else 'aot_eager'):
            model = with_masks_of_the_cpu(model_at(Place(torch.device(device))).train())
            model._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            if backend is not None:
                torch._dynamo.reset()
                model.encoder.compile(backend=backend, dynamic=False)
            torch.manual_seed(3)
            loss = model.training_step(batch_at(Place(torch.device(device))), 0)['loss']
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    @DEVICES
    @pytest.mark.integration
    def test_two_ranks_train_as_one(self, device, tmp_path):
        if device == 'cuda' and torch.cuda.device_count() < 2:
            pytest.skip('needs two GPUs')
        (tmp_path / 'device').write_text(device)
        first, second = run_on_two_ranks(Path(__file__).with_name('two_ranks.py'), tmp_path)
        assert first['contexts'] == second['contexts'] and first['losses'] != second['losses']
        assert first['weights'] == pytest.approx(second['weights'], rel=1e-6) and first['norms'] == pytest.approx(
            second['norms'], rel=1e-6
        )

    @ON_GPU
    @pytest.mark.integration
    @pytest.mark.parametrize('objective, waits', [('masked', 1), ('next_token', 1), ('both', 2)])
    def test_cuda_itself_sees_no_other_wait(self, objective, waits):
        place = Place(torch.device('cuda'))
        model = model_at(place, *OBJECTIVES[objective]).train()
        model._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batch = batch_at(place)
        model.training_step(batch, 0)['loss'].backward()  # what is made once is made
        torch.cuda.set_sync_debug_mode('warn')
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter('always')
                model.training_step(batch, 1)['loss'].backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert sum('synchroniz' in str(warning.message) for warning in seen) == waits


class TestStreams:
    @DEVICES
    @pytest.mark.integration
    @pytest.mark.parametrize('pieces', [[1280], [700, 5000, 1], [20000]])
    def test_a_session_is_equal_to_offline(self, device, pieces):
        model = tiny_model(*PLAIN).eval().to(device)
        samples, lengths = noise(2, 20000), [20000, 9000]
        output = stream(StreamingSession(model, 2, [10, 0]), samples.to(device), lengths, pieces)
        with torch.no_grad(), model.encoder.using_att_context_size([10, 0]):
            features = model.preprocessor(input_signal=samples.to(device), length=torch.tensor(lengths, device=device))
            encoded, counts = model.encoder(audio_signal=features[0], length=features[1])
        assert output.lengths.tolist() == counts.tolist()
        for row, count in enumerate(counts.tolist()):
            torch.testing.assert_close(output.encoded[row, :, :count], encoded[row, :, :count], atol=1e-3, rtol=0)

    @DEVICES
    @pytest.mark.integration
    def test_a_checkpoint_moves_between_devices(self, device, tmp_path):
        model = tiny_model(*PLAIN).eval().to(device)
        torch.save(model.state_dict(), tmp_path / 'weights.pt')
        back = tiny_model(*PLAIN, seed=1).eval()
        back.load_state_dict(torch.load(tmp_path / 'weights.pt', map_location='cpu'))
        batch, found = noise_batch(), []
        for one, place in ((model, device), (back, 'cpu')):
            signal = dict(input_signal=batch.audio.to(place), input_signal_length=batch.audio_len.to(place))
            with torch.no_grad(), one.encoder.using_att_context_size([10, 0]):
                found.append(one(**signal)[0].cpu())
        torch.testing.assert_close(found[1], found[0], **TOLERANCE)
