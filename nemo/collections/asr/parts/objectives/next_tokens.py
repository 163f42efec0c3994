# SPDX-License-Identifier: Apache-2.0
"""Prediction of next tokens (NEST-RQ, arXiv 2409.08680), horizon by horizon; K of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nemo.collections.asr.losses.ssl_losses.mlm import MultiMLMLoss, has_target
from nemo.collections.asr.losses.ssl_losses.next_token import align_next_tokens
from nemo.collections.asr.parts.att_context.receptive_field import chunk_end_look_ahead, next_token_offset
from nemo.collections.asr.parts.objectives import base
from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores, Logs, LossPositions
from nemo.collections.asr.parts.objectives.masked_tokens import why_all_frames
from nemo.collections.asr.parts.utils.config_keys import NextToken
from nemo.utils import logging

HEADS = 'next_token_decoders.'  # their names in a state dict begin so


class NextTokens(base.Objective):
    """Predicts tokens after each frame's receptive field; one ``model.next_token_decoders`` per horizon.

    Raises:
        ValueError: if the model's decoder or forward may need all frames.
    """

    name = 'next'

    def __init__(self, model: Any, options: NextToken) -> None:
        super().__init__(model)
        reason = why_all_frames(model.decoder, model.loss)
        if model.forward_is_overridden:
            reason = f"{type(model).__name__} has a forward of its own"
        if reason is not None:
            raise ValueError(f"model.objective is {model.objective}, which predicts frame by frame: {reason}")
        decoder = model.decoder
        self.token_loss = MultiMLMLoss(num_decoders=decoder.num_decoders, squeeze_single=decoder.squeeze_single)
        self.at_chunk_end = options.positions == 'chunk_end'
        self.parts = tuple(f'next_{horizon}' for horizon in range(options.horizons))
        decoders = (model.from_config_dict(model.cfg.decoder) for _ in range(options.horizons))
        model.next_token_decoders = torch.nn.ModuleList(decoders)

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder of the first horizon."""
        return self.model.next_token_decoders[0]

    def loss_positions(self, record: BatchRecord) -> LossPositions:
        """Return the frames of a pass with a next token, and their tokens at each horizon, -100 for none."""
        encoded = record.encoded.transpose(1, 2)  # type: ignore[union-attr]
        wanted = len(self.parts), self.offset(), record.encoded_lengths, record.token_lengths, self.chunk()
        return base.gather_loss_positions(*align_next_tokens(encoded, record.tokens, *wanted))

    def loss(self, record: BatchRecord) -> tuple[torch.Tensor, Logs]:
        """Return the mean over all frames and horizons, and each horizon's; see :class:`Objective`.

        Log-probabilities of one horizon exist at a time. The backward pass recomputes them: a decoder is a small
        part of the model, its log-probabilities are a large part of a step's memory.
        """
        positions = self.loss_positions(record)

        def of_horizon(positions: LossPositions, decoder: torch.nn.Module) -> Any:
            return self.token_loss.of_frames(*positions.decoded(decoder)[:2], reduction='none')

        # Nothing in here is random: the state of the generators need not be kept (on a GPU, that would synchronise).
        settings = dict(use_reentrant=False, preserve_rng_state=False)
        by_horizon = self.by_horizon(positions)
        losses = torch.stack([checkpoint(of_horizon, *pair, **settings) for pair in by_horizon])  # [K, N]
        predicted = has_target(positions.targets, dimensions=2)  # [N, K]
        means = losses.detach().sum(dim=1) / predicted.sum(dim=0).clamp(min=1)
        loss = self.mean_over_tokens(losses.sum(dim=0), predicted.sum(dim=1), positions.utterances)
        return loss, dict(zip(self.parts, means, strict=True))

    def scores(self, record: BatchRecord) -> dict[str, FrameScores]:
        """Score a pass at each horizon; see :class:`Objective`."""
        scores = {}
        for part, (positions, decoder) in zip(self.parts, self.by_horizon(self.loss_positions(record)), strict=True):
            predictions = positions.decoded(decoder).having_targets()
            scores[part] = FrameScores.of(predictions, self.token_loss)
        return scores

    def by_horizon(self, positions: LossPositions) -> Iterator[tuple[LossPositions, torch.nn.Module]]:
        """Yield the positions with their targets at each horizon, and its decoder."""
        for horizon, decoder in enumerate(self.model.next_token_decoders):
            yield positions._replace(targets=positions.targets[:, horizon]), decoder

    def offset(self, att_context_size: Any = None) -> int:
        """Return how many tokens after its own a frame predicts first; see ``next_token_offset``."""
        after_subsampling = self.model.pre_encoder is not None
        return next_token_offset(self.model.encoder, after_subsampling, att_context_size, self.at_chunk_end)

    def chunk(self) -> int:
        """Return the frames of a chunk at whose end tokens are predicted in this context; 1: every frame."""
        return chunk_end_look_ahead(self.model.encoder)[0] if self.at_chunk_end else 1

    def check(self) -> None:
        """Check that in every context that a batch can have there are tokens beyond the receptive field."""
        model, encoder = self.model, self.model.encoder
        combined, factor = model.targets.combine_time_steps, model.mask_frames_per_attention_frame
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
        for context in [*model.trained_contexts(), *(validation.contexts if validation else ())]:
            with encoder.using_att_context_size(context):
                self.offset()


def with_heads_of(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return weights for a model: heads that they lack stay as they are, others are left out."""
    own, given = _heads(model.state_dict()), _heads(state_dict)
    lacking, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    if not lacking and not unknown:
        return state_dict
    logging.info(
        f"The weights are of another objective: {len(lacking)} tensors of next_token_decoders keep their initial "
        f"values, {len(unknown)} are left out."
    )
    return {**own, **{name: value for name, value in state_dict.items() if name not in unknown}}


def check_same_heads(model: Any, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if a training run would continue one of another objective."""
    different = _heads(checkpoint.get('state_dict', {})).keys() != _heads(model.state_dict()).keys()
    if checkpoint.get('optimizer_states') and different:
        raise ValueError(
            f"model.objective is {model.objective} with {len(model.next_token_decoders or [])} horizons; the "
            "checkpoint to continue is of a run with another objective or number of horizons. Begin a run of "
            "its own from those weights, with init_from_ptl_ckpt or init_from_nemo_model"
        )


def _heads(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state_dict.items() if name.startswith(HEADS)}
