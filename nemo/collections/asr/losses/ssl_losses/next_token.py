# SPDX-License-Identifier: Apache-2.0
"""Pairs of next-token prediction (NEST-RQ, https://arxiv.org/abs/2409.08680).

Shapes: B batch, T encoder frames, S target frames, F frames in common, K horizons, H codebooks.
"""

import torch

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET, has_target


def align_next_tokens(
    encoded: torch.Tensor,
    tokens: torch.Tensor,
    horizons: int,
    offset: int,
    decoder_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    chunk: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pair frames of ``encoded`` [B, T, ...] with the ``tokens`` [B, S] or [B, S, H] that they predict.

    Of these, ``decoder_lengths`` and ``target_lengths`` [B] are valid. For the others see :func:`next_token_indices`.

    Returns:
        frames [B, F, ...], a view with F at least 1; their tokens [B, F, K] or [B, F, K, H], -100 where there is
        none; and the frames with a token at the first horizon, hence at any, [B, F] bool.
    """
    frames = min(encoded.shape[1], max(tokens.shape[1] - offset, 1))
    index = next_token_indices(frames, horizons, offset, chunk, tokens.device)
    of_target = index < target_lengths.to(tokens.device).view(-1, 1, 1)
    of_frame = torch.arange(frames, device=tokens.device) < decoder_lengths.to(tokens.device).unsqueeze(1)
    valid = of_target & of_frame.unsqueeze(2)  # [B, F, K]
    # One more, without a token, stands for those beyond the last and, as index -1, for none.
    padded = torch.nn.functional.pad(tokens.transpose(1, -1), (0, 1), value=IGNORED_TARGET).transpose(1, -1)
    wanted = padded[:, index.clamp(max=tokens.shape[1])]
    wanted = torch.where(valid.view(*valid.shape, *[1] * (tokens.dim() - 2)), wanted, IGNORED_TARGET)
    return encoded[:, :frames], wanted, has_target(wanted[:, :, 0], dimensions=2)


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
