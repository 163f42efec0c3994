# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Patch of NeMo's ``ssl_models.py``: one attention context per batch, from its draw to the loss.

Shapes: B batch, D features, T feature frames, A attention frames, M mask frames (T or A, by mask position),
S target frames, C classes, H codebooks.
"""

import copy
import inspect
from contextlib import contextmanager, nullcontext
from typing import Dict, Iterator, NamedTuple, Optional

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo.collections.asr.data.audio_to_text_dali import DALIOutputs
from nemo.collections.asr.data.ssl_dataset import set_skip_bad_audio
from nemo.collections.asr.modules.conformer_encoder import CannotStreamError, ConformerEncoder
from nemo.collections.asr.parts.att_context.answerability import masked_share_per_frame, unanswerable_frames
from nemo.collections.asr.parts.att_context.audit import MaskAudit, TrainingAudit, audit_masks
from nemo.collections.asr.parts.att_context.codebook_use import CodebookUse
from nemo.collections.asr.parts.att_context.context import AttContext, context_label
from nemo.collections.asr.parts.att_context.dynamic_context import sync_masking_to_attention
from nemo.collections.asr.parts.att_context.figures import require_matplotlib
from nemo.collections.asr.parts.att_context.layer_masks import intersect_in_style
from nemo.collections.asr.parts.att_context.model_figures import ContextFigures
from nemo.collections.asr.parts.att_context.synced_collate import (
    SYNCED_CONTEXT_KEYS,
    create_synced_context_collate,
)
from nemo.collections.asr.parts.att_context.validation import ContextValidation
from nemo.collections.asr.parts.preprocessing.features import standardize_per_feature
from nemo.collections.asr.parts.utils.known_keys import check_known
from nemo.collections.asr.parts.utils.masked_frames import (
    MaskedPredictions,
    has_forward_of,
    predict_counted,
    why_not_frame_by_frame,
)
from nemo.collections.asr.parts.utils.nonfinite_guard import NonFiniteGuard
from nemo.collections.asr.parts.utils.resumable_loader import make_resumable
from nemo.core.classes.common import typecheck
from nemo.core.neural_types import LengthsType, NeuralType, SpectrogramType
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

OWN_LOADER_KEYS = ('synced_contexts', 'skip_bad_audio', 'resumable')
TARGET_NORMALIZATIONS = (None, 'NA', 'per_feature')


class BatchRecord(NamedTuple):
    """What the last forward masked and aimed at; kept for the step's reports."""

    masks: torch.Tensor  # [B, D, M]
    mask_lengths: torch.Tensor  # [B], in mask frames
    tokens: torch.Tensor  # [B, S] or [B, S, H]
    token_lengths: torch.Tensor  # [B]
    encoded_lengths: torch.Tensor  # [B], in decoder frames


class ContextState(NamedTuple):
    """All that setting a context by hand changes, to go back to."""

    att_context_size: list  # the encoder's default
    pinned: bool  # whether the encoder keeps it in training, too
    masking_left: Optional[int]  # None for a masking that takes no context
    configured: Optional['ContextState']  # what to go back to, where it is set by hand


class SpeechEncDecSelfSupervisedModel(NonFiniteGuard, _up.SpeechEncDecSelfSupervisedModel):
    """NeMo's base class of SSL models, with a context that can be set by hand or come with a batch.

    Takes NeMo's config, and ``train_ds.synced_contexts`` with the arguments ``context_options``, ``context_probs`` and
    ``seed`` of ``create_synced_context_collate``, which the data loader then uses; ``train_ds.skip_bad_audio`` (see
    ``ssl_dataset``), ``train_ds.resumable`` (see ``make_resumable``) and ``skip_nan_grad`` (see ``NonFiniteGuard``).
    """

    _configured_contexts: Optional[ContextState] = None  # where a context is set by hand: what was before

    def set_att_context_size(self, context) -> None:
        """Attend and mask within this context until told otherwise.

        It becomes the encoder's default, which the streaming parameters follow, and it holds in training: nothing is
        drawn, a synced batch's context is passed over; only a curriculum's ceiling still narrows it. Configs and
        checkpoints do not know of it.

        Args:
            context: a pair [left, right] in attention frames (list, tuple or ListConfig; -1 = unlimited), an int (the
                left context, with right 0), the name of a preset, an ``AttContext``; or None: back to the contexts of
                the config, in training drawn for each batch where there are several.

        Raises:
            ValueError: if it is no context, or the encoder cannot follow it.
        """
        if context is None:
            if self._configured_contexts is not None:
                self._restore_contexts(self._configured_contexts)
            return
        context = self._checked_context(context)
        trained = [list(known) for known in self.encoder.att_context_size_all]
        if context not in trained:
            logging.warning(
                f"The attention context is set to {context}, which the model was not trained on; it was on "
                + ', '.join(str(known) for known in trained)
            )
        if self._configured_contexts is None:
            self._configured_contexts = self._context_state()
        self._set_default_context(context, pinned=True)
        if hasattr(self._masking(), 'left_context_size'):
            sync_masking_to_attention(self)
            logging.info(f"Attention context {context}, masking context {self._masking().left_context_size}")
        else:
            logging.warning(f"Attention context {context}; the masking takes none, it masks regardless.")

    @contextmanager
    def using_att_context_size(self, context) -> Iterator[None]:
        """Set the context as :meth:`set_att_context_size` does, and afterwards go back to what was before."""
        before = self._context_state()
        self.set_att_context_size(context)
        try:
            yield
        finally:
            self._restore_contexts(before)

    @property
    def att_context_set_by_hand(self) -> Optional[list]:
        """The context of :meth:`set_att_context_size` that holds at present, None: that of the config."""
        return None if self._configured_contexts is None else list(self.encoder.att_context_size)

    def _checked_context(self, context) -> list:
        if not isinstance(self.encoder, ConformerEncoder):
            raise ValueError(f"{type(self.encoder).__name__} has no attention context to set")
        context = self.encoder.parse_att_context_size(context, field='att_context_size')
        self.encoder.check_att_context_size(context)
        return list(context)

    def _masking(self):
        return getattr(self, 'mask_processor', None)

    def _context_state(self) -> ContextState:
        encoder = self.encoder
        masking_left = getattr(self._masking(), 'left_context_size', None)
        default = list(encoder.att_context_size)
        return ContextState(default, encoder.att_context_is_pinned, masking_left, self._configured_contexts)

    def _restore_contexts(self, state: ContextState) -> None:
        self._set_default_context(state.att_context_size, state.pinned)
        if state.masking_left is not None:
            self._masking().left_context_size = state.masking_left
        self._configured_contexts = state.configured

    def _set_default_context(self, context: list, pinned: bool) -> None:
        encoder = self.encoder
        encoder.att_context_size, encoder.att_context_is_pinned = context, pinned
        try:
            encoder.setup_streaming_params()
        except CannotStreamError:
            encoder.set_default_att_context_size(context)

    def _context_of_step(self, batch):
        """Pin the context of a training step: set by hand, or come with the batch, or drawn for the global step.

        Draws are a pure function of the step, so the ranks agree without a word, and the batches of one gradient
        accumulation share a context.
        """
        encoder = self.encoder
        if not isinstance(encoder, ConformerEncoder):
            return nullcontext()
        if self._configured_contexts is not None:
            context = encoder.att_context_size
        else:
            context = getattr(batch, 'att_context', None)
        if context is None:
            return encoder.using_att_context_size(encoder.draw_att_context_size(self.trainer.global_step))
        if encoder.att_context_ceiling is not None:
            ceiling, where = encoder.att_context_ceiling, 'encoder.att_context_ceiling'
            context = intersect_in_style(AttContext.parse(context), ceiling, encoder.att_context_style, where)
        return encoder.using_att_context_size(context)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        """Move a batch; the draw of its context is numbered by the global step, which only the trainer knows."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        draw = getattr(batch, 'context_draw', None)
        if draw is None:
            return moved
        return draw.attach(moved, batch.att_context if self._trainer is None else draw.at(self._trainer.global_step))

    def _setup_dataloader_from_config(self, config):
        own = {key: config[key] for key in OWN_LOADER_KEYS if config is not None and config.get(key) is not None}
        if not own:
            return super()._setup_dataloader_from_config(config)
        loader = super()._setup_dataloader_from_config(_without(config, own))
        return loader if loader is None else _with_own_options(loader, **own)

    def training_step(self, batch, batch_idx=0):
        """Run NeMo's training step within one context, and log it."""
        with self._context_of_step(batch) as context:
            output = self._training_step(batch, batch_idx)
            output['log'].update(self._step_logs(context, output['loss']))
        return output

    def _training_step(self, batch, batch_idx):
        """Compute a step's loss within the pinned context; a dict as NeMo's training step returns."""
        return super().training_step(batch, batch_idx)

    def _step_logs(self, context, loss) -> Dict[str, torch.Tensor]:
        return {} if context is None else {f'train_loss/ctx_{context_label(context)}': loss.detach()}

    def decoder_loss_step(self, spectrograms, spec_masks, encoded, encoded_len, targets=None, target_lengths=None):
        """Decode and compute the loss; arguments and results are NeMo's.

        NeMo tells the lengths to each loss of a ``loss_list``, but not to a single one.
        """
        takes_lengths = self.decoder_losses is None and 'decoder_lengths' in (self.loss.input_types or {})
        if not takes_lengths or self.loss.needs_labels:
            return super().decoder_loss_step(spectrograms, spec_masks, encoded, encoded_len, targets, target_lengths)
        labels = {}
        if getattr(self.decoder_ssl, 'needs_labels', False):
            labels = {'targets': targets, 'target_lengths': target_lengths}
        outputs = self.decoder_ssl(encoder_output=encoded, **labels)
        loss = self.loss(
            spectrograms=spectrograms, spec_masks=spec_masks, decoder_outputs=outputs, decoder_lengths=encoded_len
        )
        return loss, {}


class EncDecMaskedTokenPredModel(SpeechEncDecSelfSupervisedModel, _up.EncDecMaskedTokenPredModel):
    """NeMo's masked token prediction, with attention, masking and loss on one context per batch.

    Takes NeMo's config, and ``target_normalize``: ``per_feature`` makes the targets from clean features with zero
    mean and unit variance per utterance; absent or ``NA`` takes them as the preprocessor gives them, as stock does.
    """

    last_batch: Optional[BatchRecord] = None
    _told_whole_decoding = False

    def __init__(self, cfg: DictConfig, trainer=None):
        _undo_earlier_post_conv_adjustment(cfg)
        super().__init__(cfg, trainer)
        if isinstance(self.encoder, ConformerEncoder):
            self.encoder._cfg = self.cfg.encoder  # contexts that layers get at run time belong into the model's config
        self.target_normalize = self.cfg.get('target_normalize', None)
        if self.target_normalize not in TARGET_NORMALIZATIONS:
            raise ValueError(
                f"model.target_normalize is {self.target_normalize!r}; it must be one of {TARGET_NORMALIZATIONS}"
            )
        self._setup_masking()
        num_classes = getattr(self.quantizer, 'num_classes', None)
        num_books = getattr(self.quantizer, 'num_books', 1)
        self.codebook_use = CodebookUse(num_classes, num_books) if num_classes else None
        self._setup_reports()

    def _setup_reports(self) -> None:
        """Make ready what the config wants to know during training; see docs/reports.md."""
        every, contexts = self.cfg.get('audit_every_n_batches'), self.cfg.get('validate_contexts')
        self.training_audit = None if every is None else TrainingAudit(every)
        self.context_figures = ContextFigures() if self.cfg.get('log_figures') else None
        self.context_validation = None
        if contexts is None:
            return
        if not has_forward_of(self, EncDecMaskedTokenPredModel, EncDecDenoiseMaskedTokenPredModel):
            raise ValueError(f"model.validate_contexts cannot run {type(self).__name__}, which has its own forward")
        self.context_validation = ContextValidation(self, contexts, self.cfg.get('validation_masks'))

    def _setup_masking(self) -> None:
        """Tell the masking module the unit of its frames, and find out whether it follows a context at all."""
        taken = inspect.signature(self.mask_processor.forward).parameters
        self._masking_follows_context = 'effective_left_context' in taken
        if not self._masking_follows_context:
            logging.warning(f"{type(self.mask_processor).__name__} takes no attention context; it masks regardless.")
        if hasattr(self.mask_processor, 'subsampling_factor'):
            self.mask_processor.subsampling_factor = self._mask_frames_per_attention_frame()

    def _mask_frames_per_attention_frame(self) -> int:
        return getattr(self.encoder, 'subsampling_factor', 1) if self.pre_encoder is None else 1

    def on_fit_start(self) -> None:
        """Refuse, before any work is lost, targets that cannot align with the encoder's frames."""
        combined = getattr(self.quantizer, 'combine_time_steps', 1)
        if self.pre_encoder is not None and combined != 1:
            raise ValueError(
                f"model.quantizer.combine_time_steps is {combined} with mask_position post_conv; it must be 1, for "
                "the quantizer sees features after subsampling"
            )
        if self.context_figures is not None:
            require_matplotlib('model.log_figures')
        super().on_fit_start()

    @property
    def input_types(self):
        """Returns definitions of module input types"""
        return {**super().input_types, "current_frame": NeuralType(optional=True)}

    @typecheck()
    def forward(
        self,
        input_signal=None,
        input_signal_length=None,
        processed_signal=None,
        processed_signal_length=None,
        apply_mask=False,
        current_frame=None,
    ):
        """Predict the tokens of a batch, within the pinned context or, without one, one that the encoder draws.

        Args:
            input_signal: samples [B, N]; with ``input_signal_length`` [B].
            processed_signal: instead of samples, features [B, D, T]; with ``processed_signal_length`` [B].
            apply_mask: whether to mask.
            current_frame: mask frames received so far, an int or a tensor [B]; see ``RandomBlockMasking``.

        Returns:
            log-probabilities [B, A, C] or [B, A, C, H], encoded lengths [B], masks [B, D, M], tokens [B, S] or
            [B, S, H].
        """
        features = self._features('', input_signal, input_signal_length, processed_signal, processed_signal_length)
        return self._predict(features, features, apply_mask, current_frame)

    def _features(self, kind, signal, signal_length, processed, processed_length):
        """Return features [B, D, T] and lengths [B] from exactly one of samples and features."""
        has_signal = signal is not None and signal_length is not None
        has_processed = processed is not None and processed_length is not None
        if has_signal == has_processed:
            raise ValueError(
                f"{type(self).__name__}.forward takes either {kind}input_signal and {kind}input_signal_length, or "
                f"processed_{kind}signal and its length"
            )
        if has_processed:
            return processed, processed_length
        return self.preprocessor(input_signal=signal, length=signal_length)

    def _predict(self, clean, seen, apply_mask, current_frame):
        """Encode what the encoder is to see, and predict the tokens of the clean features; see ``forward``."""
        encoded, encoded_len, masks, tokens = self._encode(clean, seen, apply_mask, current_frame)
        return self.decoder(encoder_output=encoded), encoded_len, masks, tokens

    def predict_masked(self, batch, apply_mask: bool = True) -> MaskedPredictions:
        """Predict the tokens of the frames that count in the loss, and of no others.

        Runs within the pinned context or, without one, one that the encoder draws. Waits for the device once, for the
        number of these frames. Where none counts, one frame with the target -100 stands for them.

        Args:
            batch: as the data loader gives it.
            apply_mask: whether to mask; nothing counts otherwise.

        Raises:
            ValueError: if the decoder or the loss does not work frame by frame; see :attr:`whole_decoding_reason`.
        """
        if self.whole_decoding_reason is not None:
            raise ValueError(f"predict_masked does not work here: {self.whole_decoding_reason}")
        encoded, encoded_len, masks, tokens = self._encode(*self._features_of_batch(batch), apply_mask, None)
        return predict_counted(self.decoder, self.loss, encoded, tokens, masks, encoded_len)

    @property
    def whole_decoding_reason(self) -> Optional[str]:
        """Why each step decodes every frame, not only those that count; None: it does not."""
        if not has_forward_of(self, EncDecMaskedTokenPredModel, EncDecDenoiseMaskedTokenPredModel):
            return f"{type(self).__name__} has a forward of its own"
        return why_not_frame_by_frame(self.decoder, self.loss)

    def _features_of_batch(self, batch):
        """Return clean features, and those that are masked and encoded; each with lengths."""
        if isinstance(batch, DALIOutputs) and batch.has_processed_signal:
            features = batch[0], batch[1]
        else:
            features = self.preprocessor(input_signal=batch[0], length=batch[1])
        return features, features

    def _training_step(self, batch, batch_idx):
        if self._decodes_every_frame():
            return super()._training_step(batch, batch_idx)
        loss = self.loss.of_frames(*self.predict_masked(batch)[:2])
        learning_rate = self._optimizer.param_groups[0]['lr']
        logs = {'learning_rate': learning_rate, 'global_step': self.trainer.global_step, 'train_loss': loss}
        return {'loss': loss, 'log': logs}

    def _decodes_every_frame(self) -> bool:
        """Whether a step takes NeMo's own way; says once why."""
        reason = self.whole_decoding_reason
        if reason is not None and not self._told_whole_decoding:
            logging.warning(f"Decoding every frame in each step, not only those that count: {reason}.")
            self._told_whole_decoding = True
        return reason is not None

    def _encode(self, clean, seen, apply_mask, current_frame):
        """Mask and encode features; returns encoded [B, d_model, A], its lengths [B], masks and tokens.

        Args:
            clean: features [B, D, T] and lengths [B] that the targets come from.
            seen: those that are masked and encoded; ``clean`` itself where there is no noise.
        """
        with self._one_context():
            if self.pre_encoder is None:
                targets = clean
                masked, masks = self._mask(seen, apply_mask, current_frame)
                mask_lengths = seen[1]
                encoded, encoded_len = self.encoder(audio_signal=masked, length=seen[1])
            else:
                arguments = self._masking_arguments(current_frame) if apply_mask else {}
                self.pre_encoder.set_masking_enabled(apply_mask=apply_mask, **arguments)
                encoded, encoded_len = self.encoder(audio_signal=seen[0], length=seen[1])
                masks, mask_lengths = self.pre_encoder.get_current_mask(), encoded_len
                targets = self._subsampled(clean, seen, encoded_len)
        tokens, token_lengths = self._tokens(*targets)
        self.last_batch = BatchRecord(masks, mask_lengths, tokens, token_lengths, encoded_len)
        return encoded, encoded_len, masks, tokens

    def _mask(self, features, apply_mask, current_frame):
        if not apply_mask:
            return features[0], torch.zeros_like(features[0])
        arguments = self._masking_arguments(current_frame)
        return self.mask_processor(input_feats=features[0], input_lengths=features[1], **arguments)

    def _masking_arguments(self, current_frame) -> Dict:
        """Arguments that bind the masking to the present context; none for a masking module that takes none."""
        if not self._masking_follows_context:
            if current_frame is not None:
                raise ValueError(f"current_frame is given, but {type(self.mask_processor).__name__} does not take it")
            return {}
        left = self.encoder.tightest_left_context() if isinstance(self.encoder, ConformerEncoder) else -1
        return {'current_frame': current_frame, 'effective_left_context': None if left < 0 else left}

    def _subsampled(self, clean, seen, encoded_len):
        """Return clean features after the encoder's subsampling [B, d_model, A], and their lengths."""
        if clean is seen:
            return self.pre_encoder.get_current_feat().transpose(1, 2), encoded_len
        with torch.no_grad():
            features, lengths = self.pre_encoder.pre_encode(x=clean[0].transpose(1, 2), lengths=clean[1])
        return features.transpose(1, 2), lengths

    def _tokens(self, features, lengths):
        """Return the targets [B, S] or [B, S, H] of features [B, D, M], and their lengths [B]."""
        combined = getattr(self.quantizer, 'combine_time_steps', 1)
        with torch.no_grad():
            if self.target_normalize == 'per_feature':
                features = standardize_per_feature(features, lengths)
            whole = features.shape[-1] // combined * combined  # stock's quantizer takes no remainder
            _, tokens = self.quantizer(input_signal=features[..., :whole])
        return tokens, torch.div(lengths, combined, rounding_mode='floor')

    def _one_context(self):
        if isinstance(self.encoder, ConformerEncoder):
            return self.encoder.using_one_att_context_size()
        return nullcontext()

    def _step_logs(self, context, loss) -> Dict[str, torch.Tensor]:
        """What a training step masked, aimed at and lost in its context."""
        logs = {**super()._step_logs(context, loss), **self._context_logs(), **self._codebook_logs()}
        return {**logs, **self._audit_logs()}

    def _audit_logs(self) -> Dict[str, torch.Tensor]:
        if self.training_audit is None:
            return {}
        record = self.last_batch
        return self.training_audit.step(
            record.masks,
            record.mask_lengths,
            record.encoded_lengths,
            decoder_offset=self._mlm_loss_attribute('decoder_offset', 0),
            factor=self._mask_frames_per_attention_frame(),
            encoder=self.encoder,
            threshold=self._mask_threshold(),
        )

    def audit_of_last_batch(self, windows=None) -> MaskAudit:
        """Return what the last forward pass masked, and what of it none of these windows shows an answer to."""
        masks, lengths = self.last_batch[:2]
        factor = self._mask_frames_per_attention_frame()
        return audit_masks(masks, lengths, factor, windows, self._mask_threshold())

    def _context_logs(self, prefix: str = '') -> Dict[str, torch.Tensor]:
        """The context and what it left to answer, for the last batch; scalars on its device."""
        masks, lengths = self.last_batch[:2]
        share = masked_share_per_frame(masks, self._mask_frames_per_attention_frame())
        masked_frames = masks[:, 0].sum(dtype=torch.float32)
        logs = {f'{prefix}masked_share': masked_frames / lengths.sum().clamp(min=1)}
        if isinstance(self.encoder, ConformerEncoder):
            left, right = self.encoder.att_context_size[0], self.encoder.att_context_size[-1]
            unanswerable = unanswerable_frames(share, self.encoder.tightest_left_context()).sum()
            masked = (share > self._mask_threshold()).sum()
            logs[f'{prefix}unanswerable_share'] = unanswerable / masked.clamp(min=1)
            logs[f'{prefix}att_context_left'], logs[f'{prefix}att_context_right'] = float(left), float(right)
        return logs

    def _codebook_logs(self) -> Dict[str, torch.Tensor]:
        """Codebook use over the last thousand batches; warns, now and then, if the targets have collapsed."""
        if self.codebook_use is None:
            return {}
        self.codebook_use.update(self.last_batch.tokens, self.last_batch.token_lengths)
        if self.codebook_use.block_is_complete:
            self._warn_if_targets_collapsed()
        statistics = self.codebook_use.statistics()
        return {
            'codebook/codes_used': statistics.codes_used.float(),
            'codebook/perplexity': statistics.perplexity,
            'codebook/top_share': statistics.top_share,
        }

    def _warn_if_targets_collapsed(self) -> None:
        reason = self.codebook_use.collapse()
        if reason is not None:
            logging.warning(
                f"The targets have collapsed: {reason}. The loss will fall and nothing will be learned. Set "
                "model.target_normalize: per_feature, or normalise the features (model.preprocessor.normalize)."
            )

    def on_train_end(self) -> None:
        """Look at the targets once more: a short run may never have completed a block of batches."""
        super().on_train_end()
        if self.codebook_use is not None and self.codebook_use.batches and not self.codebook_use.block_is_complete:
            self._warn_if_targets_collapsed()

    def inference_pass(self, batch, batch_idx=0, dataloader_idx=0, mode='val', apply_mask=False):
        """Run NeMo's validation or test pass; in ``model.validate_contexts``, else in the default context.

        In the default context the metrics have its masked share, too.
        """
        if self.context_validation is not None and apply_mask:
            return {f'{mode}_loss': self.context_validation.step(self, batch, dataloader_idx, self._keep_for_figures)}
        with self._one_context():
            if self._decodes_every_frame():
                metrics = super().inference_pass(batch, batch_idx, dataloader_idx, mode=mode, apply_mask=apply_mask)
            else:
                metrics = {f'{mode}_loss': self.loss.of_frames(*self.predict_masked(batch, apply_mask)[:2])}
            metrics.update(self._context_logs(prefix=f'{mode}_'))
            self._keep_for_figures(batch)
        return metrics

    def _keep_for_figures(self, batch) -> None:
        if self.context_figures is not None and self._trainer is not None:
            self.context_figures.keep(self, batch)

    def on_validation_epoch_start(self) -> None:
        """Make ready for the contexts of the config."""
        super().on_validation_epoch_start()
        if self.context_validation is not None:
            self.context_validation.start(self, len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Make ready for the contexts of the config."""
        super().on_test_epoch_start()
        if self.context_validation is not None:
            self.context_validation.start(self, len(self.trainer.num_test_batches))

    def on_validation_epoch_end(self, *args, **kwargs):
        """Add the contexts' results up over the ranks, log them as NeMo does, and draw."""
        if self.context_validation is not None:
            self.context_validation.finish('val')
        logged = super().on_validation_epoch_end(*args, **kwargs)
        if self.context_figures is not None:
            self.context_figures.log(self)
        return logged

    def on_test_epoch_end(self, *args, **kwargs):
        """Add the contexts' results up over the ranks, and log them as NeMo does."""
        if self.context_validation is not None:
            self.context_validation.finish('test')
        return super().on_test_epoch_end(*args, **kwargs)

    def test_step(self, batch, batch_idx=0, dataloader_idx=0):
        """Compute a test batch's metrics; stock files them under validation, where no test looks for them."""
        metrics = self.inference_pass(batch, batch_idx, dataloader_idx, mode='test', apply_mask=True)
        outputs = self.test_step_outputs
        if isinstance(self.trainer.test_dataloaders, list) and len(self.trainer.test_dataloaders) > 1:
            outputs = outputs[dataloader_idx]
        outputs.append(metrics)
        return metrics

    def multi_validation_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Average the validation batches: NeMo's ``val_loss``, and the context's metrics."""
        if self.context_validation is not None:
            return self.context_validation.summary('val', dataloader_idx)
        averaged = super().multi_validation_epoch_end(outputs, dataloader_idx)
        return _add_means(averaged, outputs)

    def multi_test_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Average the test batches: NeMo's ``test_loss``, and the context's metrics."""
        if self.context_validation is not None:
            return self.context_validation.summary('test', dataloader_idx)
        averaged = super().multi_test_epoch_end(outputs, dataloader_idx)
        return _add_means(averaged, outputs)

    def _mask_threshold(self) -> float:
        return self._mlm_loss_attribute('mask_threshold', 0.8)

    def _mlm_loss_attribute(self, name: str, default):
        return getattr(getattr(self.loss, 'mlm_loss', self.loss), name, default)


class EncDecDenoiseMaskedTokenPredModel(EncDecMaskedTokenPredModel, _up.EncDecDenoiseMaskedTokenPredModel):
    """NeMo's denoising masked token prediction (NEST, https://arxiv.org/abs/2408.13106) on one context per batch.

    The encoder sees masked noisy features; the targets come from the clean ones.
    """

    @property
    def input_types(self):
        """Returns definitions of module input types; stock's lack the names that its forward takes."""
        features = NeuralType(('B', 'D', 'T'), SpectrogramType(), optional=True)
        lengths = NeuralType(tuple('B'), LengthsType(), optional=True)
        return {
            **super().input_types,
            "processed_noise_signal": features,
            "processed_noise_signal_length": lengths,
            "processed_noisy_input_signal": features,
            "processed_noisy_input_signal_length": lengths,
        }

    @typecheck()
    def forward(
        self,
        input_signal=None,
        input_signal_length=None,
        processed_signal=None,
        processed_signal_length=None,
        noise_signal=None,  # noqa: as in NeMo, noise comes already mixed into the noisy signal
        noise_signal_length=None,  # noqa
        processed_noise_signal=None,  # noqa
        processed_noise_signal_length=None,  # noqa
        noisy_input_signal=None,
        noisy_input_signal_length=None,
        processed_noisy_input_signal=None,
        processed_noisy_input_signal_length=None,
        apply_mask=False,
        current_frame=None,
    ):
        """Predict the tokens of the clean signal from the noisy one; see the parent class."""
        clean = self._features('', input_signal, input_signal_length, processed_signal, processed_signal_length)
        noisy = self._features(
            'noisy_',
            noisy_input_signal,
            noisy_input_signal_length,
            processed_noisy_input_signal,
            processed_noisy_input_signal_length,
        )
        return self._predict(clean, noisy, apply_mask, current_frame)

    def _features_of_batch(self, batch):
        """Return the features of the clean audio, and of the noisy one; each with lengths."""
        clean = self.preprocessor(input_signal=batch.audio, length=batch.audio_len)
        return clean, self.preprocessor(input_signal=batch.noisy_audio, length=batch.noisy_audio_len)


def _without(config, keys):
    """Return a copy of a data loader's config without what NeMo's loaders do not know."""
    config = copy.deepcopy(config)
    with open_dict(config) if OmegaConf.is_config(config) else nullcontext():
        for key in keys:
            del config[key]
    return config


def _with_own_options(loader, synced_contexts=None, skip_bad_audio=None, resumable=None):
    """Apply to a data loader the options that NeMo's do not know; None leaves it as it is."""
    if skip_bad_audio is not None:
        set_skip_bad_audio(loader.dataset, skip_bad_audio)
    if resumable is not None:
        loader = make_resumable(loader, resumable)
    return loader if synced_contexts is None else _with_synced_contexts(loader, synced_contexts)


def _with_synced_contexts(loader, synced):
    """Let a data loader's batches carry contexts; lhotse's, too, passes its ready batches through ``collate_fn``."""
    check_known('synced_contexts', synced, SYNCED_CONTEXT_KEYS)
    if 'context_options' not in synced:
        raise ValueError(f"synced_contexts is {synced}; it needs context_options")
    if not isinstance(loader, torch.utils.data.DataLoader):
        raise ValueError(f"synced_contexts needs a torch data loader; {type(loader).__name__} collates nothing")
    loader.collate_fn = create_synced_context_collate(loader.collate_fn, **synced)
    return loader


def _add_means(averaged: Optional[Dict], outputs: list) -> Optional[Dict]:
    """Add to NeMo's averages and their ``log`` the mean of every metric that it leaves out."""
    if averaged:
        for name in outputs[0].keys() - averaged.keys():
            mean = torch.stack([torch.as_tensor(output[name], dtype=torch.float32) for output in outputs]).mean()
            averaged[name] = averaged['log'][name] = mean
    return averaged


def _undo_earlier_post_conv_adjustment(cfg: DictConfig) -> None:
    """Give a restored post-conv config its block size in feature frames back.

    NeMo divides ``masking.block_size`` by the subsampling factor in the config itself, which it then saves, and
    divides again on each restore, until nothing is masked. A config that it has adjusted has the two ``feat_in`` set
    to ``d_model`` and ``loss.combine_time_steps`` to 1.
    """
    if cfg.get('mask_position', 'pre_conv') != 'post_conv':
        return
    adjusted = cfg.masking.feat_in == cfg.quantizer.feat_in == cfg.encoder.d_model
    if adjusted and cfg.loss.get('combine_time_steps', None) == 1:
        with open_dict(cfg):
            cfg.masking.block_size = cfg.masking.block_size * cfg.encoder.subsampling_factor
