# SPDX-License-Identifier: Apache-2.0
"""Make NeMo manifests with phones of speechocean762, the public corpus of OpenSLR 101.

    python benchmarks/downstream/prepare_speechocean762.py --corpus speechocean762 --output manifests \
        [--test-speakers-of benchmarks/downstream/results/probe.csv]

Reads the corpus as its archive unpacks: WAVE/SPEAKERxxxx/*.WAV, train/ and test/ with Kaldi's wav.scp, utt2spk and
text, and resource/scores.json, whose phones are taken without their stress. Writes OUTPUT/speechocean762_train_manifest.json and
OUTPUT/speechocean762_test_manifest.json.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import soundfile
from phones import labels_of

from nemo.utils.atomic_files import write_text

PARTS = ('train', 'test')


def table(path: Path) -> dict[str, str]:
    """Return the rest of each line of one of Kaldi's text files, by the line's first word.

    Raises:
        ValueError: naming the file, if it is not there or a line has no more than a key.
    """
    if not path.is_file():
        raise ValueError(f"--corpus: there is no file {path}")
    found = {}
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        key, *rest = line.split(maxsplit=1)
        if not rest:
            raise ValueError(f"{path}, line {number} has no value for {key}")
        found[key] = rest[0].strip()
    return found


def phone_string(scored: dict, where: str) -> str:
    """Return the phones of an utterance of scores.json, without stress.

    Args:
        scored: of the utterance; the ``phones`` of its words are lists, or strings with spaces.
        where: what an error calls it.

    Raises:
        ValueError: if there are no words, or one has an unknown phone.
    """
    found = []
    for word in scored.get('words', ()):
        names = word['phones'].split() if isinstance(word['phones'], str) else word['phones']
        found += [name.rstrip('012') for name in names]
    if not found:
        raise ValueError(f"{where}: there are no phones")
    labels_of(' '.join(found), where)  # refuses unknown ones
    return ' '.join(found)


def entries(corpus: Path, part: str, scores: dict) -> list[dict]:
    """Return the manifest's entries of one part, in the order of its wav.scp.

    Args:
        corpus: the folder of the corpus.
        part: ``train`` or ``test``.
        scores: what scores.json holds.

    Raises:
        ValueError: naming what is missing.
    """
    audio, speakers, texts = (table(corpus / part / name) for name in ('wav.scp', 'utt2spk', 'text'))
    made = []
    for name, path in audio.items():
        missing = [
            what for what, of in (('utt2spk', speakers), ('text', texts), ('scores.json', scores)) if name not in of
        ]
        if missing:
            raise ValueError(f"--corpus {corpus}: {missing[0]} has no utterance {name}")
        file = (corpus / path).resolve()
        if not file.is_file():
            raise ValueError(f"--corpus {corpus}: there is no audio file {file}")
        made.append(
            {
                'audio_filepath': str(file),
                'duration': soundfile.info(str(file)).duration,
                'text': texts[name].lower(),
                'phones': phone_string(scores[name], f'scores.json, {name}'),
                'speaker': f'so-{speakers[name]}',
            }
        )
    return made


def speakers_of(result: Path) -> set[str]:
    """Return the test speakers of a CSV file of run.py."""
    with open(result, newline='') as file:
        return {name for row in csv.DictReader(file) if row['arm'] == '(speakers)' for name in row['errors'].split()}


def prepare(corpus: Path, output: Path, test_speakers=None) -> dict[str, int]:
    """Write the manifests; returns how many utterances each has.

    Args:
        corpus: the folder of the corpus.
        output: for the manifests.
        test_speakers: to keep of the test; None keeps all.

    Raises:
        ValueError: naming what is missing.
    """
    path = corpus / 'resource/scores.json'
    if not path.is_file():
        raise ValueError(f"--corpus: there is no file {path}")
    scores = json.loads(path.read_text(encoding='utf-8'))
    made = {part: entries(corpus, part, scores) for part in PARTS}
    if test_speakers is not None:
        lacking = sorted(test_speakers - {entry['speaker'] for entry in made['test']})
        if lacking:
            raise ValueError(f"--corpus {corpus}: the test has no speaker {lacking[0]}")
        made['test'] = [entry for entry in made['test'] if entry['speaker'] in test_speakers]
    output.mkdir(parents=True, exist_ok=True)
    for part, found in made.items():
        text = ''.join(json.dumps(entry) + '\n' for entry in found)
        write_text(output / f'speechocean762_{part}_manifest.json', text)
    return {part: len(found) for part, found in made.items()}


def main(argv=None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--corpus', type=Path, required=True, help='the folder that the archive unpacks to')
    parser.add_argument('--output', type=Path, required=True, help='the folder for the manifests')
    parser.add_argument('--test-speakers-of', type=Path, help='a probe.csv of run.py: keep its test speakers only')
    options = parser.parse_args(argv)
    try:
        kept = None if options.test_speakers_of is None else speakers_of(options.test_speakers_of)
        counts = prepare(options.corpus, options.output, kept)
    except (ValueError, OSError) as error:
        print(f'prepare_speechocean762: error: {error}', file=sys.stderr)
        return 2
    print('; '.join(f'speechocean762_{part}_manifest.json: {count} utterances' for part, count in counts.items()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
