# SPDX-License-Identifier: Apache-2.0
"""What is checked on a real GPU, where there is one.

Each test that is marked for a GPU has a twin without one: the same test with ``cpu``, or the same scenario on the fake
device in ``test_scenarios.py``.
"""

import warnings
from pathlib import Path

import pytest
import torch
from device.model_scenarios import OBJECTIVES, PLAIN, batch_at, model_at
from device.place import Place
from device.run_scenarios import SCENARIOS, TOLERANCE, run
from live_streams import noise, stream
from ranks import run_on_two_ranks
from tiny_nest import POST_CONV, batches, fit, noise_batch, tiny_model

from nemo.collections.asr.losses import MLMLoss
from nemo.collections.asr.modules import RandomBlockMasking
from nemo.collections.asr.parts.streaming.session import StreamingSession

pytestmark = pytest.mark.integration
ON_GPU = pytest.mark.run_only_on('GPU')
DEVICES = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=ON_GPU)])
# Scenarios that draw random numbers draw others on each device.
DRAWS = ('masking', 'training', 'validation', 'run of', 'live streams, m')
WITHOUT_DRAWS = [scenario for scenario in SCENARIOS if not scenario.startswith(DRAWS)]
TRAINS = [scenario for scenario in SCENARIOS if scenario.startswith(('masking', 'training', 'validation'))]
STEPS = {**OBJECTIVES, 'masked, post_conv': POST_CONV, 'masked, by blocks': ('model.encoder.blockwise_attention=on',)}


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


@ON_GPU
@pytest.mark.parametrize('scenario', WITHOUT_DRAWS)
def test_a_gpu_computes_what_the_cpu_does(scenario):
    expected, found = (run(scenario, Place(torch.device(device))) for device in ('cpu', 'cuda'))
    assert found['error'] is None, found['error']
    torch.testing.assert_close(found['values'], expected['values'], rtol=1e-2, atol=1e-3, check_dtype=False)


@ON_GPU
@pytest.mark.parametrize('precision', ['float32', 'autocast float16', 'autocast bfloat16'])
@pytest.mark.parametrize('scenario', TRAINS)
def test_a_gpu_masks_trains_and_validates(scenario, precision):
    found = run(scenario, Place(torch.device('cuda'), precision))
    assert found['error'] is None, found['error']
    assert all(value.isfinite().all() for value in found['values'] if value.is_floating_point())


@DEVICES
@pytest.mark.parametrize('as_tensor', [False, True])
def test_masks_keep_dtype_and_window_and_the_module_need_not_be_moved(device, as_tensor):
    masking = RandomBlockMasking(feat_in=80, block_size=8, mask_prob=0.5)
    features, lengths = torch.randn(2, 80, 100, device=device).half(), torch.tensor([100, 90], device=device)
    window = dict(current_frame=torch.tensor([50, 50], device=device) if as_tensor else 50, effective_left_context=20)
    masked, masks = masking(input_feats=features, input_lengths=lengths, **window)
    assert masked.device.type == masks.device.type == device and masked.dtype == masks.dtype == torch.float16
    assert masks[:, :, 30:50].any() and not masks[:, :, 50:].any() and not masks[:, :, :30].any()


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_the_loss_is_that_of_double_precision(device, dtype):
    log_probs = torch.randn(4, 21, 32).log_softmax(-1).to(dtype)
    targets, masks = torch.randint(32, (4, 20)), (torch.rand(4, 1, 160) < 0.5).float().expand(-1, 8, -1)
    loss = MLMLoss(combine_time_steps=8, mask_threshold=0.3, decoder_offset=1)
    named = dict(targets=targets, masks=masks, decoder_lengths=torch.tensor([21, 15, 9, 1]))
    expected = loss(decoder_outputs=log_probs.double(), **named)
    found = loss(decoder_outputs=log_probs.to(device), **{name: value.to(device) for name, value in named.items()})
    assert found.device.type == device and found.item() == pytest.approx(expected.item(), rel=1e-4)


def step(device, *overrides, compile=False):
    """A training step with the masks of the CPU; returns the loss and the gradient of all weights, on the CPU."""
    place = Place(torch.device(device))
    model = with_masks_of_the_cpu(model_at(place, *overrides).train())
    model._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if compile:
        torch._dynamo.reset()
        model.encoder.compile(backend='inductor', dynamic=False)
    torch.manual_seed(3)
    loss = model.training_step(batch_at(place), 0)['loss']
    loss.backward()
    own = [weight.grad.flatten().cpu() for weight in model.parameters() if weight.grad is not None]
    return loss.item(), torch.cat(own)


@DEVICES
@pytest.mark.parametrize('kind', STEPS)
def test_a_step_is_that_of_the_cpu(device, kind):
    (expected, gradients), (found, own) = step('cpu', *STEPS[kind]), step(device, *STEPS[kind])
    assert found == pytest.approx(expected, rel=1e-3) and found > 0
    assert torch.nn.functional.cosine_similarity(own, gradients, dim=0) > 0.999


@ON_GPU
def test_a_compiled_step_is_the_plain_one():  # on the CPU: test_ssl_models_precision.py
    assert step('cuda', compile=True)[0] == pytest.approx(step('cuda')[0], rel=1e-3)


@DEVICES
@pytest.mark.parametrize('precision', ['bf16-mixed', '16-mixed'])
def test_training_in_mixed_precision_is_that_of_the_cpu_in_full(device, precision):
    losses = []
    for settings in ({}, dict(precision=precision, accelerator='gpu' if device == 'cuda' else 'cpu')):
        torch.manual_seed(0)
        run = fit(with_masks_of_the_cpu(tiny_model(*PLAIN)), batches(3), 3, **settings)
        losses.append(run.logger.column('train_loss'))
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=0.05)


@DEVICES
def test_two_ranks_train_as_one(device, tmp_path):
    if device == 'cuda' and torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    (tmp_path / 'device').write_text(device)
    first, second = run_on_two_ranks(Path(__file__).with_name('two_ranks.py'), tmp_path)
    assert first['contexts'] == second['contexts'] and first['losses'] != second['losses']
    for name in ('weights', 'norms'):
        assert first[name] == pytest.approx(second[name], rel=1e-6)


@ON_GPU
@pytest.mark.parametrize('objective, waits', [('masked', 1), ('next_token', 1), ('both', 2)])
def test_cuda_itself_sees_no_other_wait(objective, waits):
    place = Place(torch.device('cuda'))
    model, batch = model_at(place, *OBJECTIVES[objective]).train(), batch_at(place)
    model._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.training_step(batch, 0)['loss'].backward()  # what is made once is made
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            model.training_step(batch, 1)['loss'].backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert sum('synchroniz' in str(warning.message) for warning in seen) == waits


@DEVICES
@pytest.mark.parametrize('pieces', [[1280], [700, 5000, 1], [20000]])
def test_a_session_is_equal_to_offline(device, pieces):
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
def test_a_checkpoint_moves_between_devices(device, tmp_path):
    model = tiny_model(*PLAIN).eval().to(device)
    torch.save(model.state_dict(), tmp_path / 'weights.pt')
    restored = tiny_model(*PLAIN, seed=1).eval()
    restored.load_state_dict(torch.load(tmp_path / 'weights.pt', map_location='cpu'))
    batch, found = noise_batch(), []
    for one, place in ((model, device), (restored, 'cpu')):
        signal = dict(input_signal=batch.audio.to(place), input_signal_length=batch.audio_len.to(place))
        with torch.no_grad(), one.encoder.using_att_context_size([10, 0]):
            found.append(one(**signal)[0].cpu())
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)
