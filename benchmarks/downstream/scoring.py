# SPDX-License-Identifier: Apache-2.0
"""The phone errors of a recogniser in each context: of every utterance at once, and of some streamed live."""

from collections.abc import Sequence
from pathlib import Path

import data
import phones
import torch
from settings import CONTEXTS, label_of
from tqdm import tqdm

from nemo.collections.asr.models import EncDecCTCModel
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession

PIECE = 5120  # samples that a live stream gets at a time: 0.32 s


def restore(path: Path) -> EncDecCTCModel:
    """Restore a recogniser, in eval mode.

    Raises:
        ValueError: if its characters are not the phones'.
    """
    model = EncDecCTCModel.restore_from(str(path), map_location='cpu').eval()
    if list(model.decoder.vocabulary) != list(phones.CHARACTERS):
        raise ValueError(f"{path} recognises {model.decoder.vocabulary}; it must be {list(phones.CHARACTERS)}")
    model.preprocessor.featurizer.dither = 0.0  # the session has none, either
    return model


@torch.inference_mode()
def recognise(model, samples: torch.Tensor) -> dict[str, str]:
    """Return the phones that are heard in samples [1, N] at once, in each context."""
    features, length = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
    heard = {}
    for context in CONTEXTS:
        with model.encoder.using_att_context_size(context):
            encoded, lengths = model.encoder(audio_signal=features, length=length)
        path = model.decoder(encoder_output=encoded).argmax(dim=2)[0, : int(lengths[0])]
        heard[label_of(context)] = phones.read_path(path)
    return heard


@torch.inference_mode()
def recognise_live(model, samples: torch.Tensor, context) -> str:
    """Return the phones that are heard in samples [1, N], streamed piece by piece in one context."""
    session = StreamingSession(model, att_context_size=context, return_tokens=True)
    outputs = [session.step(piece) for piece in samples.split(PIECE, dim=1)] + [session.finish()]
    output = StreamingOutput.concatenate(outputs)
    return phones.read_path(output.tokens[0, : int(output.lengths[0])])


def score(model, entries: Sequence[dict]) -> dict:
    """Recognise utterances, and count the errors of each.

    Args:
        model: of :func:`restore`.
        entries: of a joined manifest.

    Returns:
        by the label of each context, the errors and what was ``heard``, utterance by utterance.
    """
    heard = [recognise(model, _samples(entry)) for entry in tqdm(entries, desc='recognising', unit='utterance')]
    said = [entry['text'] for entry in entries]
    texts = {label: [one[label] for one in heard] for label in map(label_of, CONTEXTS)}
    return {'errors': {label: phones.errors(found, said) for label, found in texts.items()}, 'heard': texts}


def score_live(model, entries: Sequence[dict], offline: dict, number: int) -> dict:
    """Stream some of the utterances, evenly spread, and compare with what was heard at once.

    Args:
        model: of :func:`restore`.
        entries: of a joined manifest.
        offline: what :func:`score` returned for them.
        number: of utterances.

    Returns:
        ``utterances``, by their place; and by context the errors live and at once, and how many texts are the same.
    """
    places = sorted({index * len(entries) // number for index in range(min(number, len(entries)))})
    said, found = [entries[place]['text'] for place in places], {}
    for context in CONTEXTS:
        label = label_of(context)
        at_once = [offline['heard'][label][place] for place in places]
        live = [
            recognise_live(model, _samples(entries[place]), context) for place in tqdm(places, desc=f'live {label}')
        ]
        found[label] = {
            'errors': sum(phones.errors(live, said)),
            'errors_offline': sum(phones.errors(at_once, said)),
            'same_texts': sum(one == other for one, other in zip(live, at_once)),
        }
    return {'utterances': places, 'contexts': found}


def _samples(entry: dict) -> torch.Tensor:
    return torch.from_numpy(data.read_audio(entry)).float().unsqueeze(0)
