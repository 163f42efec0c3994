# SPDX-License-Identifier: Apache-2.0
"""What attention and masking are really made for, recorded inside a ``with`` block."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import lightning.pytorch as pl

from nemo.collections.asr.modules import conformer_encoder


@contextmanager
def recording_attention():
    """Record the context [left, right] of each attention mask that NeMo's encoder makes, in the list that is given."""
    contexts, stock = [], conformer_encoder._up.ConformerEncoder
    create_masks = stock._create_masks

    def recording(encoder, att_context_size, *args, **kwargs):
        contexts.append(list(att_context_size))
        return create_masks(encoder, att_context_size, *args, **kwargs)

    with mock.patch.object(stock, '_create_masks', recording):
        yield contexts


@dataclass
class ContextRecord:
    """The contexts that were really used, one entry for each forward pass."""

    attention: list = field(default_factory=list)
    """What the attention mask was made for, [left, right]; with contexts per layer, one entry for each context."""
    masking: list = field(default_factory=list)
    """The masking's left context, -1 = unlimited."""


@contextmanager
def recording_contexts(model):
    """Record what a model's attention masks and its masking are made for, inside a ``with`` block."""
    record, mask = ContextRecord(), model.mask_processor.forward

    def recording_mask(*args, effective_left_context=None, **kwargs):
        own = model.mask_processor.left_context_size
        record.masking.append(own if effective_left_context is None else effective_left_context)
        return mask(*args, effective_left_context=effective_left_context, **kwargs)

    with recording_attention() as record.attention, mock.patch.object(model.mask_processor, 'forward', recording_mask):
        yield record


class StepOfBatch(pl.Callback):
    """Records the global step that each training batch belongs to."""

    def __init__(self):
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer, *args):
        self.steps.append(trainer.global_step)
