# SPDX-License-Identifier: Apache-2.0
"""All that is reported of a model of masked token prediction; see docs/reports.md.

A model has one such object, also where the config enables no report.
"""

import torch

from nemo.collections.asr.parts.att_context.visible_frames import no_visible_frame_shares
from nemo.collections.asr.parts.att_context.windows import tightest_window_of
from nemo.collections.asr.parts.objectives.record import BatchRecord
from nemo.collections.asr.parts.ssl_reports.audit import TrainingAudit
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse
from nemo.collections.asr.parts.ssl_reports.figures import require_matplotlib
from nemo.collections.asr.parts.ssl_reports.model_figures import ContextFigures, attention_frame_ms
from nemo.collections.asr.parts.ssl_reports.validation import ContextValidation
from nemo.collections.asr.parts.utils.config_keys import Model
from nemo.utils import logging

Logs = dict[str, torch.Tensor]


class ModelReports:
    """Audit, use of the codebook, validation in contexts, and pictures of one model.

    Args:
        model: an ``EncDecMaskedTokenPredModel``, whose config enables the reports; it is not kept.

    Raises:
        ValueError: naming the config key, its value and what is allowed.
    """

    def __init__(self, model):
        options, contexts = Model.parse(model.cfg), model.cfg.get('validate_contexts')
        classes = getattr(model.quantizer, 'num_classes', None)
        self.codebook_use = CodebookUse(classes, getattr(model.quantizer, 'num_books', 1)) if classes else None
        every = options.audit_every_n_batches
        self.audit = None if every is None else TrainingAudit(every)
        self.figures = ContextFigures() if options.log_figures else None
        self.validation: ContextValidation | None = None
        if contexts is not None:
            if model.forward_is_overridden:
                raise ValueError(
                    f"model.validate_contexts cannot run {type(model).__name__}, which has its own forward"
                )
            self.validation = ContextValidation(model, contexts, model.cfg.get('validation_masks'))

    def check(self) -> None:
        """Check before training that pictures can be drawn.

        Raises:
            ValueError: if matplotlib is missing.
        """
        if self.figures is not None:
            require_matplotlib('model.log_figures')

    def of_training_batch(self, model, record: BatchRecord | None) -> Logs:
        """Return what to log of a training batch, within its pinned context; scalars on its device.

        Args:
            model: the model.
            record: of the batch's forward pass; None where a forward of somebody's own leaves none.
        """
        if record is None:
            return {}
        return {**self.of_pass(model, record), **self._codebook_logs(record), **self._audit_logs(model, record)}

    def _audit_logs(self, model, record: BatchRecord) -> Logs:
        """Audit a batch, if the config enables it."""
        if self.audit is None:
            return {}
        logs = self.audit.step(record, model.encoder, attention_frame_ms(model)) if model.objectives.masks else {}
        for objective in model.objectives:
            logs.update(objective.audit(record))
        return logs

    def of_pass(self, model, record: BatchRecord | None, prefix: str = '') -> Logs:
        """Return the present context, and the shares of frames that are masked, and have no visible frame; scalars."""
        if record is None:
            return {}
        encoder, logs = model.encoder, {}
        window, offset = tightest_window_of(encoder), model.objectives.offset()
        if window is not None:
            left, right = encoder.att_context_size[0], encoder.att_context_size[-1]
            logs[f'{prefix}att_context_left'], logs[f'{prefix}att_context_right'] = float(left), float(right)
        if offset is not None:
            logs[f'{prefix}next_token_offset'] = float(offset)
        if not model.objectives.masks:
            return logs
        share = record.masked_share()
        masked_frames = record.masks[:, 0].sum(dtype=torch.float32)
        logs[f'{prefix}masked_share'] = masked_frames / record.mask_lengths.sum().clamp(min=1)
        frames = torch.div(record.mask_lengths, record.factor, rounding_mode='floor')
        shares = no_visible_frame_shares(encoder, share, record.threshold, frames)
        logs.update({f'{prefix}masking/{name}': value for name, value in shares.items()})
        return logs

    def _codebook_logs(self, record: BatchRecord) -> Logs:
        """Count the batch's targets; warns, now and then, if they have collapsed."""
        if self.codebook_use is None:
            return {}
        self.codebook_use.update(record.tokens, record.token_lengths)
        if self.codebook_use.block_is_complete:
            self._warn_if_targets_collapsed()
        return self.codebook_use.logs()

    def _warn_if_targets_collapsed(self) -> None:
        reason = self.codebook_use.collapse()
        if reason is not None:
            logging.warning(
                f"The targets have collapsed: {reason}. The loss will fall and nothing will be learned. Set "
                "model.target_normalize: per_feature, or normalise the features (model.preprocessor.normalize)."
            )

    def targets_were_refined(self) -> None:
        """Check the counts of the targets once more and clear them: the codes have changed."""
        if self.codebook_use is not None and self.codebook_use.batches:
            self._warn_if_targets_collapsed()
            self.codebook_use.forget()

    def end_of_training(self) -> None:
        """Look at the targets once more: a short run may never have completed a block of batches."""
        if self.codebook_use is not None and self.codebook_use.batches and not self.codebook_use.block_is_complete:
            self._warn_if_targets_collapsed()

    def keep_for_figures(self, model, record: BatchRecord | None) -> None:
        """Keep an utterance of a validation batch, within its context, for the pictures."""
        if self.figures is not None and record is not None and model._trainer is not None:
            self.figures.keep(model, record)
