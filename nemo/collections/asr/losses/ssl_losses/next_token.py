# SPDX-License-Identifier: Apache-2.0
"""Loss of next-token prediction (NEST-RQ, https://arxiv.org/abs/2409.08680).

Shapes: B batch, T encoder frames, S target frames, F frames in common, K horizons, C classes, H codebooks.
"""

import torch

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET, MLMLoss, MultiMLMLoss


class NextTokenLoss(torch.nn.Module):
    """Pairs frames with their next tokens, and computes the loss by horizon; no synchronisation.

    Args:
        horizons: K.
        num_decoders: H; the loss of a frame is the mean over the codebooks.
        squeeze_single: whether a single codebook comes without its dimension.
    """

    def __init__(self, horizons: int = 4, num_decoders: int = 1, squeeze_single: bool = True):
        super().__init__()
        self.horizons = horizons
        squeezed = squeeze_single and num_decoders == 1
        self.frame_loss = MLMLoss() if squeezed else MultiMLMLoss(num_decoders=num_decoders)

    def of_horizon(self, log_probs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each frame's loss at a horizon (:meth:`MLMLoss.of_frames`), and which have a target [...]."""
        has_target = targets != IGNORED_TARGET
        has_target = has_target.any(dim=-1) if self.frame_loss.several_books else has_target
        return self.frame_loss.of_frames(log_probs, targets, reduction='none'), has_target

    def align(
        self,
        encoded: torch.Tensor,
        tokens: torch.Tensor,
        offset: int,
        decoder_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
        chunk: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pair frames of ``encoded`` [B, T, ...] with the ``tokens`` [B, S] or [B, S, H] that they predict.

        Args:
            encoded, tokens: of these two, ``decoder_lengths`` and ``target_lengths`` [B] are valid.
            offset, chunk: see :func:`next_token_indices`.

        Returns:
            frames [B, F, ...], a view with F at least 1; their tokens [B, F, K] or [B, F, K, H], -100 where there is
            none; and the frames with a token at the first horizon, hence at any, [B, F] bool.
        """
        frames = min(encoded.shape[1], max(tokens.shape[1] - offset, 1))
        wanted = torch.nn.functional.pad(tokens.transpose(1, -1), (0, 1), value=IGNORED_TARGET).transpose(1, -1)
        wanted = _without_padding(wanted, target_lengths)
        index = next_token_indices(frames, self.horizons, offset, chunk, tokens.device).clamp(max=tokens.shape[1])
        wanted = _without_padding(wanted[:, index], decoder_lengths)
        counted = wanted[:, :, 0] != IGNORED_TARGET
        return encoded[:, :frames], wanted, counted if counted.dim() == 2 else counted.any(dim=-1)


def next_token_indices(
    frames: int, horizons: int, offset: int, chunk: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """Return the token that each of F frames predicts at each of K horizons, [F, K] int64; -1: none.

    Frame j predicts tokens e + offset ... e + offset + K - 1, where e is the last frame of its chunk. In a chunk the
    last K frames predict; a chunk of one frame leaves every frame to predict its own next tokens.
    """
    frame = torch.arange(frames, device=device)
    end = frame - frame % chunk + chunk - 1
    index = end.unsqueeze(1) + offset + torch.arange(horizons, device=device)
    return index.masked_fill((end - frame >= horizons).unsqueeze(1), -1)


def _without_padding(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return tokens [B, S, ...] with -100 at and beyond lengths [B]."""
    beyond = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.to(tokens.device).unsqueeze(1)
    return tokens.masked_fill(beyond.view(*beyond.shape, *[1] * (tokens.dim() - 2)), IGNORED_TARGET)
