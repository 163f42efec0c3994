# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Patch of NeMo's ``ssl_models.py``: one attention context per batch, from its draw to the loss.

Shapes: B batch, D features, T feature frames, A attention frames, M mask frames (T or A, by mask position),
S target frames, C classes, H codebooks.
"""

import inspect
from contextlib import nullcontext
from typing import Dict, NamedTuple, Optional

import torch
from omegaconf import DictConfig, open_dict

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context.answerability import masked_share_per_frame, unanswerable_frames
from nemo.collections.asr.parts.att_context.codebook_use import CodebookUse
from nemo.collections.asr.parts.preprocessing.features import standardize_per_feature
from nemo.core.classes.common import typecheck
from nemo.core.neural_types import LengthsType, NeuralType, SpectrogramType
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

TARGET_NORMALIZATIONS = (None, 'NA', 'per_feature')


class _Batch(NamedTuple):
    """What the last forward masked and aimed at; kept for the step's reports."""

    masks: torch.Tensor  # [B, D, M]
    mask_lengths: torch.Tensor  # [B], in mask frames
    tokens: torch.Tensor  # [B, S] or [B, S, H]
    token_lengths: torch.Tensor  # [B]


class EncDecMaskedTokenPredModel(_up.EncDecMaskedTokenPredModel):
    """NeMo's masked token prediction, with attention, masking and loss on one context per batch.

    Takes NeMo's config, and ``target_normalize``: ``per_feature`` makes the targets from clean features with zero
    mean and unit variance per utterance; absent or ``NA`` takes them as the preprocessor gives them, as stock does.
    """

    _last_batch: Optional[_Batch] = None

    def __init__(self, cfg: DictConfig, trainer=None):
        _undo_earlier_post_conv_adjustment(cfg)
        super().__init__(cfg, trainer)
        self.target_normalize = self.cfg.get('target_normalize', None)
        if self.target_normalize not in TARGET_NORMALIZATIONS:
            raise ValueError(
                f"model.target_normalize is {self.target_normalize!r}; it must be one of {TARGET_NORMALIZATIONS}"
            )
        self._setup_masking()
        num_classes = getattr(self.quantizer, 'num_classes', None)
        num_books = getattr(self.quantizer, 'num_books', 1)
        self.codebook_use = CodebookUse(num_classes, num_books) if num_classes else None

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
        """Encode what the encoder is to see, and predict the tokens of the clean features; see ``forward``.

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
        self._last_batch = _Batch(masks, mask_lengths, tokens, token_lengths)
        return self.decoder(encoder_output=encoded), encoded_len, masks, tokens

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

    def _context_of_step(self, step: int):
        """Pin the context of a training step: a pure function of the step, so the ranks agree without a word."""
        if isinstance(self.encoder, ConformerEncoder):
            return self.encoder.using_att_context_size(self.encoder.draw_att_context_size(step))
        return nullcontext()

    def training_step(self, batch, batch_idx=0):
        """Run NeMo's training step within one context, and log what was masked, aimed at and lost in it.

        The context is drawn for ``trainer.global_step``: the batches of one gradient accumulation share it.
        """
        with self._context_of_step(self.trainer.global_step) as context:
            output = super().training_step(batch, batch_idx)
            output['log'].update(self._context_logs(), **self._codebook_logs())
            if context is not None:
                output['log'][f'train_loss/ctx_{_label(context)}'] = output['loss'].detach()
        return output

    def _context_logs(self, prefix: str = '') -> Dict[str, torch.Tensor]:
        """The context and what it left to answer, for the last batch; scalars on its device."""
        masks, lengths, _, _ = self._last_batch
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
        self.codebook_use.update(self._last_batch.tokens, self._last_batch.token_lengths)
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
        """Run NeMo's validation or test pass in the default context; adds its masked share to the metrics."""
        with self._one_context():
            metrics = super().inference_pass(batch, batch_idx, dataloader_idx, mode=mode, apply_mask=apply_mask)
            metrics.update(self._context_logs(prefix=f'{mode}_'))
        return metrics

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
        averaged = super().multi_validation_epoch_end(outputs, dataloader_idx)
        return _add_means(averaged, outputs)

    def multi_test_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Average the test batches: NeMo's ``test_loss``, and the context's metrics."""
        averaged = super().multi_test_epoch_end(outputs, dataloader_idx)
        return _add_means(averaged, outputs)

    def _mask_threshold(self) -> float:
        loss = getattr(self.loss, 'mlm_loss', self.loss)
        return getattr(loss, 'mask_threshold', 0.8)


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


def _label(context) -> str:
    return '_'.join(str(side) for side in context)


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
