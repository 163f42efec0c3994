# SPDX-License-Identifier: Apache-2.0
"""What is reported in training and validation is tested in ``test_ssl_models.py`` and ``test_ssl_models_validation.py``."""

import torch
from tiny_nest import noise_batch, tiny_model

REPORT_KEYS = ('validate_contexts', 'validation_masks', 'audit_every_n_batches', 'log_figures')


def test_it_is_there_also_when_nothing_is_asked_of_it():
    model = tiny_model(*(f'~model.{key}' for key in REPORT_KEYS)).eval()
    reports = model.reports
    assert (reports.audit, reports.figures, reports.validation) == (None, None, None)
    assert reports.of_training_batch(model, None) == {} == reports.of_pass(model, None)
    reports.keep_for_figures(model, None)
    reports.end_of_training()


def test_a_record_gives_the_logs_of_its_masks_and_targets():
    model, batch = tiny_model().eval(), noise_batch((3.0, 2.0))
    with torch.no_grad(), model.encoder.using_att_context_size([20, 0]):
        record = model.encode_batch(batch, model.mask_processor)
        logs = model.reports.of_training_batch(model, record)
        of_pass = model.reports.of_pass(model, record, prefix='val_')
    assert {f'val_{name}' for name in logs} > set(of_pass)
    assert (logs['att_context_left'], logs['att_context_right']) == (20, 0)
    assert logs['masked_share'] == record.masks[:, 0].sum() / record.mask_lengths.sum()
