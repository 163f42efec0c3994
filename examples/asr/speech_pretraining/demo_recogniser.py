# SPDX-License-Identifier: Apache-2.0
"""The second part of the demo: a streaming recogniser of characters, from the pre-trained encoder and from scratch."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import demo_stages
import torch
from script_tools import manifest_lines, manifest_seconds, read_audio, restore, sample_rate_of, write_text
from streaming_tools import chunk_seconds, encode_offline, streamable_contexts

CONFIG = 'streaming_ctc_tiny'
MINUTES = 5.0  # of transcribed speech, at most
ARMS = {'pretrained': 'from the pre-trained encoder', 'scratch': 'from scratch'}
TAKEN_OVER = {'pretrained': '[preprocessor,encoder]', 'scratch': '[]'}  # what is left out is random


def transcribed(manifest: str, minutes: float = float('inf')) -> list[dict]:
    """Return the first entries of a manifest that have a text, up to a number of minutes, with absolute paths."""
    found, seconds = [], 0.0
    for _, line in manifest_lines(Path(manifest)):
        entry = json.loads(line)
        if not (entry.get('text') or '').strip():
            continue
        seconds += entry['duration']
        if seconds > 60 * minutes:
            break
        audio = Path(manifest).resolve().parent / entry['audio_filepath']  # an absolute path stays as it is
        found.append({**entry, 'audio_filepath': str(audio)})
    return found


def write_transcripts(data: dict, folder: Path) -> dict | None:
    """Write manifests of what is transcribed.

    Args:
        data: the demo's manifests, by role.
        folder: where to.

    Returns:
        the manifests ``train`` and ``validation``, or None if in either no entry has a text.
    """
    entries = {'train': transcribed(data['train'], MINUTES), 'validation': transcribed(data['validation'])}
    if not all(entries.values()):
        return None
    folder.mkdir(exist_ok=True)
    for role, found in entries.items():
        write_text(folder.resolve() / f'{role}_manifest.json', ''.join(json.dumps(entry) + '\n' for entry in found))
    return {role: folder.resolve() / f'{role}_manifest.json' for role in entries}


def fine_tune(arm: str, model_file: Path, manifests: dict, folder: Path, steps: int) -> Path:
    """Fine-tune one of ``ARMS``, or leave it alone if that is done.

    Args:
        arm: its name.
        model_file: the pre-trained model.
        manifests: of :func:`write_transcripts`.
        folder: of the recognisers.
        steps: of training.

    Returns:
        its .nemo file.
    """
    tuned = folder / f'{arm}.nemo'
    if tuned.exists():
        demo_stages.say(f'{tuned} is there already: no fine-tuning')
        return tuned
    overrides = [
        f"init_from_nemo_model.pretrained.path='{model_file.resolve()}'",
        f'init_from_nemo_model.pretrained.include={TAKEN_OVER[arm]}',
        f"model.train_ds.manifest_filepath='{manifests['train']}'",
        f"model.validation_ds.manifest_filepath='{manifests['validation']}'",
        f'trainer.max_steps={steps}',
    ]
    demo_stages.train('finetune_streaming.py', CONFIG, overrides, folder / arm, tuned)
    return tuned


def spell(tokens: Iterable[int], labels: list[str]) -> str:
    """Return the text of a greedy CTC path: repetitions once, without blanks, which are the class behind the labels."""
    path = list(tokens)
    kept = [token for token, before in zip(path, [None, *path]) if token != before and token < len(labels)]
    return ''.join(labels[token] for token in kept)


def recognise(model, samples, context) -> str:
    """Return what a CTC model understands of samples [N] in an attention context."""
    encoded = encode_offline(model, torch.from_numpy(samples).unsqueeze(0), context)
    with torch.no_grad():
        tokens = model.decoder(encoder_output=encoded).argmax(dim=2)[0]
    return spell(tokens.tolist(), list(model.decoder.vocabulary))


def error_rates(model, manifest: Path) -> dict[str, float]:
    """Return the character error rate of a CTC model on a manifest, by the name of each of its contexts."""
    from nemo.collections.asr.metrics.wer import word_error_rate
    from nemo.collections.asr.parts.att_context.context import context_label

    entries = transcribed(str(manifest))
    spoken = [read_entry(entry, sample_rate_of(model)) for entry in entries]
    rates = {}
    for context in model.encoder.att_context_size_all:
        heard = [recognise(model, samples, context) for samples in spoken]
        texts = [entry['text'] for entry in entries]
        rates[context_label(context)] = word_error_rate(hypotheses=heard, references=texts, use_cer=True)
    return rates


def read_entry(entry: dict, rate: int):
    """Return the samples [N] of a manifest's entry."""
    return read_audio(Path(entry['audio_filepath']), rate, entry.get('offset') or 0.0, entry['duration'])


def words_as_they_come(model, samples, context) -> Iterator[tuple[float, str]]:
    """Stream samples [N] through a CTC model; yield the seconds heard and the text so far at every new word."""
    from nemo.collections.asr.parts.streaming.session import StreamingSession

    rate = sample_rate_of(model)
    session = StreamingSession(model, att_context_size=context, return_text=True)
    pieces = torch.from_numpy(samples).unsqueeze(0).split(max(round(chunk_seconds(model, context) * rate), 1), dim=1)
    seconds, words = 0.0, []
    for piece in pieces:
        (update,) = session.step(piece).text
        seconds += piece.shape[1] / rate
        if update.final_words:
            words += [word.text for word in update.final_words]
            yield seconds, ' '.join(words)
    session.finish()
    yield seconds, session.transcript().text


def show_stream(model, manifest: Path) -> None:
    """Stream the first utterance of a manifest in the model's first context that can, and print its words."""
    (entry, *_), contexts = transcribed(str(manifest)), streamable_contexts(model)
    context = contexts[0]
    demo_stages.say(f"Streaming {Path(entry['audio_filepath']).name} in context {context}, the words as they come:")
    for seconds, text in words_as_they_come(model, read_entry(entry, sample_rate_of(model)), context):
        print(f'   {seconds:5.2f} s  {text}', flush=True)
    print(f"   was said {entry['text']}", flush=True)


def error_table(rates: dict, minutes: float):
    """Lay out character error rates: by arm, then by context."""
    from rich.table import Table

    table = Table(title=f'Character error rate on the validation data after {minutes:.1f} minutes of transcripts')
    for name, justify in (
        ('context', 'left'),
        ('pre-trained', 'right'),
        ('from scratch', 'right'),
        ('fewer', 'right'),
    ):
        table.add_column(name, justify=justify)
    for context, rate in rates['pretrained'].items():
        other = rates['scratch'][context]
        fewer = f'{1 - rate / other:.0%}' if other else '-'
        table.add_row(context.replace('_', ', '), f'{rate:.1%}', f'{other:.1%}', fewer)
    return table


def compare(data: dict, folder: Path, model_file: Path, steps: int, console) -> dict | None:
    """Fine-tune and score both recognisers, print that, and stream a sentence.

    Args:
        data: the demo's manifests, by role.
        folder: of the recognisers.
        model_file: the pre-trained model.
        steps: of fine-tuning; 0 leaves it out.
        console: to print the table on.

    Returns:
        character error rates by arm and context; None if it was left out.
    """
    manifests = write_transcripts(data, folder) if steps else None
    if manifests is None:
        why = 'no entry of the manifests has a text' if steps else 'it is to have 0 steps'
        demo_stages.say(f'The recogniser is left out: {why}')
        return None
    minutes, models = manifest_seconds(manifests['train']) / 60, {}
    for arm in ARMS:
        demo_stages.say(f'Fine-tuning a recogniser on {minutes:.1f} minutes of transcripts, {ARMS[arm]}')
        models[arm] = restore(fine_tune(arm, model_file, manifests, folder, steps), 'cpu')
    rates = {arm: error_rates(model, manifests['validation']) for arm, model in models.items()}
    console.print(error_table(rates, minutes))
    show_stream(models['pretrained'], manifests['validation'])
    return rates
