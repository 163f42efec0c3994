# SPDX-License-Identifier: Apache-2.0
"""Fine-tune an encoder by CTC until the held-out error rate stops improving."""

import copy
import random

import torch
from arms import KINDS
from data import Speech
from phones import PHONES

from nemo.collections.asr.parts.ssl_reports.probe import count_errors

HELD_OUT = 40  # utterances
EVERY = 250  # steps from one look at the held-out utterances to the next
MOST = 20_000  # steps
UTTERANCES = 8  # of a step


class Recogniser(torch.nn.Module):
    """An encoder and one linear layer; the last class is the blank."""

    def __init__(self, encoder, width: int):
        super().__init__()
        self.encoder, self.classify = encoder, torch.nn.Linear(width, len(PHONES) + 1)

    def forward(self, features, lengths):
        """Return log-probabilities [B, A, C + 1] and lengths [B]."""
        encoded, encoded_lengths = self.encoder(audio_signal=features, length=lengths)
        return self.classify(encoded.transpose(1, 2)).log_softmax(dim=-1), encoded_lengths


def ctc_loss(log_probs: torch.Tensor, lengths: torch.Tensor, utterances: list) -> torch.Tensor:
    """Return the CTC loss of log-probabilities [B, A, C + 1] with lengths [B] of utterances."""
    labels = [torch.tensor(utterance.labels) for utterance in utterances]
    sizes = torch.tensor([len(row) for row in labels])
    return torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1), torch.cat(labels), lengths, sizes, blank=len(PHONES), zero_infinity=True
    )


@torch.no_grad()
def errors_of(recogniser: Recogniser, speech: Speech, utterances: list, context) -> list[int]:
    """Return the errors of the greedy CTC path in each utterance."""
    recogniser.eval()
    hypotheses = []
    with recogniser.encoder.using_att_context_size(context):
        for batch in speech.batches(utterances):
            for log_probs, length in zip(*recogniser(*batch)):
                path = log_probs[:length].argmax(dim=1).unique_consecutive()
                hypotheses.append(path[path != len(PHONES)].tolist())
    recogniser.train()
    return count_errors(hypotheses, [utterance.labels for utterance in utterances])


def converged(steps: int, best: int, every: int = EVERY) -> bool:
    """Whether the best error rate lies before the last fifth of the steps, after at least ten looks."""
    return steps >= 10 * every and best < 0.8 * steps


def fine_tune(
    encoder, width: int, speech: Speech, kind: str, seed: int, every: int = EVERY, most: int = MOST
) -> tuple[int, dict[tuple, list[int]]]:
    """Fine-tune until convergence; return the best step, and the test errors of its weights by context.

    Args:
        encoder: is changed.
        width: of its output.
        speech: of the comparison.
        kind: of contexts; each step draws one.
        seed: of batches, contexts and the linear layer.
        every, most: steps between two looks at the held-out utterances, and steps at most.
    """
    held_out = min(HELD_OUT, len(speech.probe) // 4)
    tuned_on, watched = speech.probe[held_out:], speech.probe[:held_out]
    torch.manual_seed(seed)
    recogniser = Recogniser(encoder, width).train()
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.98))
    best, fewest, weights, step = 0, float('inf'), None, 0
    while step < most and not converged(step, best, every):
        for group in optimizer.param_groups:
            group['lr'] = 1e-3 * min(1.0, (step + 1) / 500)
        drawn = random.Random(f'tune {seed} {step}')
        chosen = drawn.sample(tuned_on, min(UTTERANCES, len(tuned_on)))
        with encoder.using_att_context_size(drawn.choice(KINDS[kind].contexts)):
            log_probs, lengths = recogniser(*speech.batch([utterance.features for utterance in chosen]))
            ctc_loss(log_probs, lengths, chosen).backward()
        torch.nn.utils.clip_grad_norm_(recogniser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % every == 0:
            errors = sum(sum(errors_of(recogniser, speech, watched, context)) for context in KINDS[kind].judged)
            if errors < fewest:
                best, fewest, weights = step, errors, copy.deepcopy(recogniser.state_dict())
    recogniser.load_state_dict(weights)
    return best, {context: errors_of(recogniser, speech, speech.test, context) for context in KINDS[kind].judged}
