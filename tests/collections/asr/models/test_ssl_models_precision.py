# SPDX-License-Identifier: Apache-2.0
"""Lower precision, compilers, activation checkpointing, and several processes: the same results, or nearly."""

from pathlib import Path

import pytest
import torch
from ranks import run_on_two_ranks
from tiny_nest import TWO_LAYERS, batches, fit, noise_batch, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from nemo.collections.asr.parts.submodules.conformer_modules import ConformerLayer

SHARDED_RUN = Path(__file__).with_name('sharded_run.py')


def loss_and_gradients(model):
    """The loss of one training step in the context [10, 0], and the gradients by name."""
    torch.manual_seed(0)
    model.train()
    with model.encoder.using_att_context_size([10, 0]):
        record = model.encode_batch(noise_batch((2.0, 1.0)), model.masking_in_context())
    loss = model.objectives.loss(record).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize('objective', ['masked', 'both'])
@pytest.mark.parametrize('precision', ['16-mixed', 'bf16-true'])  # Lightning takes bf16-mixed for 16-mixed on CPUs
def test_training_in_lower_precision_learns_as_in_full(precision, objective):
    overrides = (*TWO_LAYERS, f'+model.objective={objective}')
    full, lower = (
        fit(tiny_model(*overrides), batches(3), max_steps=2, precision=asked).logger.column('train_loss')
        for asked in ('32-true', precision)
    )
    allowed = 0.1 if precision == 'bf16-true' else 0.02
    assert lower == pytest.approx(full, rel=allowed) and len(lower) == 2


def test_a_compiled_encoder_follows_each_context_and_is_compiled_once_for_each():
    encoder = tiny_model(*TWO_LAYERS, 'model.encoder.att_context_size=[[40,0],[5,0]]').encoder.eval()
    features, lengths = torch.randn(2, 80, 160), torch.tensor([160, 100])
    encoder(audio_signal=features, length=lengths)  # NeMo's type check is made at the first call
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(encoder, backend=counter, fullgraph=True, dynamic=False)
    outputs = []
    for context in ([40, 0], [5, 0], [40, 0]):
        with encoder.using_att_context_size(context):
            found = compiled(audio_signal=features, length=lengths)[0]
            expected = encoder(audio_signal=features, length=lengths)[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        outputs.append(found)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert counter.frame_count == 2
    encoder.set_layer_att_context_size([[2, 0], [2, 0]])
    found = compiled(audio_signal=features, length=lengths)[0]
    torch.testing.assert_close(found, encoder(audio_signal=features, length=lengths)[0], atol=1e-6, rtol=0)


def test_compiled_layers_take_the_mask_as_an_input_and_compile_once_for_all_contexts_of_a_sampler():
    sampler = '{full_prob: 0.2, chunk_size: [1, 8], left_chunks: [1, 6], left_limited_prob: 0.7}'
    overrides = (
        'model.encoder.att_context_style=chunked_limited',
        'model.encoder.att_context_size=[8,3]',
        'model.encoder.blockwise_attention=off',
        f'+model.encoder.att_context_sampler={sampler}',
    )
    encoder, plain = (tiny_model(*overrides).encoder.train() for _ in range(2))
    features, lengths = torch.randn(1, 80, 160), torch.tensor([160])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    for layer in encoder.layers:
        layer.compile(backend=counter, dynamic=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(8):
            outputs = []
            for each in (encoder, plain):
                torch.manual_seed(step)
                outputs.append(each(audio_signal=features, length=lengths)[0])
            torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
    assert counter.frame_count == 1 and plain.att_context_policy.at(0) != plain.att_context_policy.at(1)


def test_a_model_trains_with_its_encoder_compiled_in_place():
    plain, compiled = tiny_model(*TWO_LAYERS), tiny_model(*TWO_LAYERS)
    torch._dynamo.reset()
    compiled.encoder.compile(backend='aot_eager', dynamic=False)
    expected, gradients = loss_and_gradients(plain)
    loss, found = loss_and_gradients(compiled)
    assert loss == pytest.approx(expected, rel=1e-6) and found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize('objective', ['masked', 'next_token'])
def test_checkpointed_layers_give_the_same_gradients_and_keep_their_contexts(objective):
    plain, checkpointed = (tiny_model(*TWO_LAYERS, f'+model.objective={objective}') for _ in range(2))
    apply_activation_checkpointing(checkpointed.encoder, check_fn=lambda module: isinstance(module, ConformerLayer))
    expected, gradients = loss_and_gradients(plain)
    loss, found = loss_and_gradients(checkpointed)
    assert loss == expected
    found = {name.replace('_checkpoint_wrapped_module.', ''): gradient for name, gradient in found.items()}
    assert found.keys() == gradients.keys() and all(torch.equal(found[name], gradients[name]) for name in gradients)
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    checkpointed.encoder.layers[0].self_attention.att_context_size = [5, 0]
    assert checkpointed.encoder.tightest_left_context() == 5


@pytest.mark.integration
def test_sharded_and_replicated_models_with_hooks_compute_what_one_process_does(tmp_path):
    for results in run_on_two_ranks(SHARDED_RUN, tmp_path):
        for kind in ('replicated', 'sharded'):
            assert results[kind]['loss'] == pytest.approx(results['alone']['loss'], rel=1e-5)
            assert results[kind]['gradients'] == pytest.approx(results['alone']['gradients'], rel=1e-4)
            assert results[kind]['hooks'] == ['forward', 'backward']
            assert results[kind]['contexts'] == [[10, 0], [20, 0]] and results[kind]['narrowed'] == 5
