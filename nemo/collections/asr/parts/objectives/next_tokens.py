# SPDX-License-Identifier: Apache-2.0
"""Prediction of next tokens (NEST-RQ, https://arxiv.org/abs/2409.08680), one horizon after the other.

Shapes: B batch, D the encoder's width, N loss positions, K horizons, S target frames, C classes, H codebooks.
"""

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET
from nemo.collections.asr.losses.ssl_losses.next_token import NextTokenLoss, next_token_indices
from nemo.collections.asr.parts.att_context.receptive_field import chunk_end_look_ahead, next_token_offset
from nemo.collections.asr.parts.objectives.base import (
    FrameScores,
    Logs,
    LossPositions,
    Objective,
    decode,
    gather_loss_positions,
)
from nemo.collections.asr.parts.objectives.masked_tokens import why_all_frames
from nemo.collections.asr.parts.objectives.record import BatchRecord
from nemo.collections.asr.parts.utils.config_keys import NextToken
from nemo.utils import logging

HEADS = 'next_token_decoders.'  # their names in a state dict begin so


class NextTokens(Objective):
    """Predicts the tokens after the receptive field of each frame; each horizon has a decoder.

    Args:
        model: an ``EncDecMaskedTokenPredModel``; it gets the ``next_token_decoders``.
        options: of the config.

    Raises:
        ValueError: if the model's decoder or forward may need all frames.
    """

    name = 'next'

    def __init__(self, model, options: NextToken):
        super().__init__(model)
        reason = why_all_frames(model.decoder, model.loss)
        if model.forward_is_overridden:
            reason = f"{type(model).__name__} has a forward of its own"
        if reason is not None:
            raise ValueError(f"model.objective is {model.objective}, which predicts frame by frame: {reason}")
        books = dict(num_decoders=model.decoder.num_decoders, squeeze_single=model.decoder.squeeze_single)
        self.token_loss = NextTokenLoss(options.horizons, **books)
        self.at_chunk_end = options.positions == 'chunk_end'
        self.parts = tuple(f'next_{horizon}' for horizon in range(options.horizons))
        decoders = (model.from_config_dict(model.cfg.decoder) for _ in range(options.horizons))
        model.next_token_decoders = torch.nn.ModuleList(decoders)

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder of the first horizon."""
        return self.model.next_token_decoders[0]

    def loss_positions(self, record: BatchRecord) -> LossPositions:
        """Return the frames of a pass with a next token, and their tokens at each horizon, -100 where there is none."""
        return gather_loss_positions(*self._align(record, slice(None)))

    def _align(self, record: BatchRecord, rows: slice):
        """Pair the frames of some utterances with their tokens; see ``NextTokenLoss.align``."""
        lengths = record.encoded_lengths[rows], record.token_lengths[rows]
        encoded = record.encoded[rows].transpose(1, 2)  # type: ignore[index]
        return self.token_loss.align(encoded, record.tokens[rows], self.offset(), *lengths, self.chunk())

    def loss(self, record: BatchRecord) -> tuple[torch.Tensor, Logs]:
        """Return the mean over all pairs of a frame and a horizon, and that of each horizon; see :class:`Objective`.

        Log-probabilities of one horizon exist at a time. The backward pass recomputes them: a decoder is a small
        part of the model, its log-probabilities are a large part of a step's memory.
        """
        positions = self.loss_positions(record)

        def of_horizon(outputs, targets, decoder):
            lost, counted = self.token_loss.of_horizon(decode(decoder, outputs), targets)
            return lost.sum(), counted.sum(), lost.detach(), counted

        # Nothing in here is random: the state of the generators need not be kept (on a GPU, that would synchronise).
        settings = dict(use_reentrant=False, preserve_rng_state=False)
        pairs = [
            checkpoint(of_horizon, positions.outputs, positions.targets[:, horizon], decoder, **settings)
            for horizon, decoder in enumerate(self.model.next_token_decoders)
        ]
        totals, counts, losses, counted = (torch.stack(part) for part in zip(*pairs, strict=True))
        self.frame_losses = losses.sum(dim=0), counted.sum(dim=0), positions.utterances
        means = (totals / counts.clamp(min=1)).detach()
        loss = totals.sum() / counts.sum().clamp(min=1) * self.rank_weight(counts.sum())
        return loss, dict(zip(self.parts, means, strict=True))

    def scores(self, record: BatchRecord) -> dict[str, FrameScores]:
        """Score a pass at each horizon; see :class:`Objective`."""
        positions, scores = self.loss_positions(record), {}
        for horizon, (part, decoder) in enumerate(zip(self.parts, self.model.next_token_decoders, strict=True)):
            targets = positions.targets[:, horizon]
            valid = (targets != IGNORED_TARGET).view(len(targets), -1).any(dim=1)
            of_horizon = positions._replace(targets=targets).at(valid.nonzero().squeeze(1))
            scores[part] = FrameScores.of(of_horizon.decoded(decoder), self.token_loss.frame_loss)
        return scores

    def offset(self, att_context_size=None) -> int:
        """Return how many tokens after its own a frame predicts first; see :class:`Objective`.

        Args:
            att_context_size: the context; None takes the present one.
        """
        after_subsampling = self.model.pre_encoder is not None
        return next_token_offset(self.model.encoder, after_subsampling, att_context_size, self.at_chunk_end)

    def chunk(self) -> int:
        """Return the frames of a chunk at whose end tokens are predicted in the present context; 1: every frame."""
        return chunk_end_look_ahead(self.model.encoder)[0] if self.at_chunk_end else 1

    def _indices(self, frames: int, device) -> torch.Tensor:
        """Return the token that each frame predicts at each horizon, [F, K]; -1 where it predicts none."""
        return next_token_indices(frames, self.token_loss.horizons, self.offset(), self.chunk(), device)

    def check(self) -> None:
        """Check that in every context that a batch can have there are tokens beyond the receptive field.

        Raises:
            ValueError: naming the context, or the config key, and the reason.
        """
        model, encoder = self.model, self.model.encoder
        combined, factor = getattr(model.quantizer, 'combine_time_steps', 1), model.mask_frames_per_attention_frame
        if combined != factor:
            raise ValueError(
                f"model.quantizer.combine_time_steps is {combined}; with model.objective {model.objective} it must be "
                f"{factor}, the feature frames of an encoder frame"
            )
        if not model._encoder_has_context():
            self.offset()  # raises
        override, sampler = model.att_context_override, encoder.att_context_policy.sampler
        if override is None and sampler is not None and sampler.full_prob > 0:
            raise ValueError(
                f"model.encoder.att_context_sampler.full_prob is {sampler.full_prob}; with model.objective "
                f"{model.objective} it must be 0: where the receptive field is the utterance there is no next token"
            )
        validation = model.reports.validation
        synced = (model.cfg.get('train_ds') or {}).get('synced_contexts') or {}
        trained = [*encoder.att_context_size_all, *(synced.get('context_options') or ())]
        for context in [
            *(trained if override is None else [override]),
            *(validation.contexts if validation else ()),
        ]:
            with encoder.using_att_context_size(context):
                self.offset()

    def audit(self, record: BatchRecord) -> Logs:
        """Return the share of a batch's frames that predict a token, by horizon; near the end there is none."""
        lengths, frames = record.encoded_lengths, record.tokens.shape[1]  # later frames have no next token
        index = self._indices(frames, lengths.device)
        inside = torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)  # [B, F]
        predicts = (index >= 0) & (index < record.token_lengths.view(-1, 1, 1)) & inside.unsqueeze(2)
        shares = predicts.sum(dim=(0, 1)) / lengths.sum().clamp(min=1)
        return {f'audit/counted_share/{part}': share for part, share in zip(self.parts, shares, strict=True)}

    def surprise(self, record: BatchRecord, index: int) -> np.ndarray:
        """Return the loss of each token of one utterance at the first horizon, NaN where none predicts it."""
        with torch.no_grad():
            frames, targets, _ = self._align(record, slice(index, index + 1))
            lost, counted = self.token_loss.of_horizon(decode(self.decoder, frames[0]), targets[0, :, 0])
        surprise = np.full(int(record.token_lengths[index]), np.nan)
        where = counted.nonzero().squeeze(1)
        predicted = self._indices(frames.shape[1], where.device)[where, 0]
        surprise[predicted.cpu().numpy()] = lost[where].float().cpu().numpy()
        return surprise


def with_heads_of(model, state_dict: dict) -> dict:
    """Return weights for a model: heads that they lack stay as they are, others are left out."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith(HEADS)}
    given = {name for name in state_dict if name.startswith(HEADS)}
    if own.keys() == given:
        return state_dict
    for names, what in ((own.keys() - given, 'keep their initial values'), (given - own.keys(), 'are left out')):
        if names:
            logging.info(f"The weights are of another objective: {len(names)} tensors of next_token_decoders {what}.")
    return {**own, **{name: value for name, value in state_dict.items() if name not in given - own.keys()}}


def check_same_heads(model, checkpoint: dict) -> None:
    """Check that a training run continues one of the same objective.

    Raises:
        ValueError: naming the key, and what to do instead.
    """
    given, own = (
        {name for name in names if name.startswith(HEADS)}
        for names in (checkpoint.get('state_dict', {}), model.state_dict())
    )
    if checkpoint.get('optimizer_states') and given != own:
        raise ValueError(
            f"model.objective is {model.objective} with {len(model.next_token_decoders or [])} horizons; the "
            "checkpoint to continue is of a run with another objective or number of horizons. Begin a run of "
            "its own from those weights, with init_from_ptl_ckpt or init_from_nemo_model"
        )
