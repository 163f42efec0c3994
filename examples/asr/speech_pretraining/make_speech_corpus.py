# SPDX-License-Identifier: Apache-2.0
"""Make a speech corpus with transcripts on any machine, in seconds and without a download.

    python make_speech_corpus.py --output DIR [--minutes 30] [--seed 0]

The eSpeak NG synthesiser of the PyPI package ``espeakng-loader`` reads sentences of a small English grammar with four
voices (numbers, dates, commands: ``corpus_sentences.py``). DIR gets 16 kHz mono wav files and four NeMo manifests with
relative paths. ``train_manifest.json`` has ``--minutes`` of speech, without its pauses. ``validation_manifest.json`` and
``test_manifest.json`` have a tenth of that each, with sentences that are in no other split, a fifth of them in a voice
that train does not have. ``noise_manifest.json`` has noise. The same settings give the same bytes. A complete corpus is
used again; an interrupted one, or one of other settings, is replaced.
"""

import argparse
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import random
import sys
import wave
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr
from corpus_sentences import make_sentence, transcript
from script_tools import report_error, require_patches
from tqdm import tqdm

SAMPLE_RATE = 16000  # Hz
SHORTEST, LONGEST = 2.0, 9.0  # seconds of an utterance of several sentences
RECIPE = 5  # raise it when this script's output changes, so that corpora on disk are replaced
PATIENCE = 120  # seconds to wait for one utterance
SETTINGS = "corpus.json"  # written last: it marks a complete corpus
SPLITS = ("train", "validation", "test", "noise")

# eSpeak's voices, with variants (formants, pitch, roughness); a held-out voice is in one split only. They speak slowly and pause
# between words: CTC writes no more than one character in 80 ms, and a causal encoder has to write later than it hears.
VOICES = ("en-us+m3", "en-us+f2", "en-gb-x-rp+m7", "en-gb-x-rp+f4")
HELD_OUT_VOICES = {"validation": ("en-us+f5",), "test": ("en-us+m5",)}
RATES = (80, 90)  # words per minute
WORD_GAP = 10  # in eSpeak's unit


@dataclass(frozen=True)
class Speaker:
    """A voice: ``rate`` in words per minute, ``pitch`` and ``pitch_range`` on eSpeak's scale of 0 to 100."""

    voice: str
    rate: int
    pitch: int
    pitch_range: int


@dataclass(frozen=True)
class Utterance:
    """All that it takes to synthesise one file, so that any process can do it.

    Attributes:
        name: file name without suffix.
        sentences: read one after the other until ``target`` seconds are full.
        level: root mean square of the speech in dB of full scale.
        floor: root mean square of the white noise under it, in dB of full scale.
        seed: of the synthesiser's and the noise floor's random numbers.
    """

    name: str
    speaker: Speaker
    sentences: tuple = field(repr=False)
    target: float = 8.0
    level: float = -26.0
    floor: float = -65.0
    seed: int = 0


def make_speakers(rng, voices):
    """Return one ``Speaker`` for each of eSpeak's voices."""
    return [Speaker(voice, rng.randint(*RATES), rng.randint(35, 65), rng.randint(40, 60)) for voice in voices]


def plan_split(rng, split, seconds, speakers):
    """Return the utterances of a split, about ``seconds`` of speech in all; the speakers take turns."""
    utterances, planned, turns = [], 0.0, []
    while planned < seconds:
        turns = turns or rng.sample(speakers, len(speakers))
        speaker, target = turns.pop(), rng.uniform(3.0, 7.5)
        sentences = tuple(make_sentence(rng, split) for _ in range(10))
        name = f"{split}-{len(utterances):05d}"
        level, floor = rng.uniform(-30.0, -22.0), rng.uniform(-75.0, -55.0)
        utterances.append(Utterance(name, speaker, sentences, target, level, floor, rng.randrange(2**31)))
        planned += target
    return utterances


def plan_corpus(minutes, seed):
    """Return the utterances of the splits train, validation and test, in that order."""
    rng = random.Random(seed)
    known = make_speakers(rng, VOICES)
    planned = plan_split(rng, "train", 60 * minutes, known)
    for split, voices in HELD_OUT_VOICES.items():
        planned += plan_split(rng, split, max(6 * minutes, 20), known + make_speakers(rng, voices))
    return planned


class Synthesiser:
    """eSpeak NG by ctypes: text in, float64 samples at 16 kHz out. One per process: not thread-safe."""

    _RETRIEVAL_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
    _RATE, _PITCH, _RANGE, _WORD_GAP = 1, 3, 4, 7  # espeak_PARAMETER

    def __init__(self):
        import espeakng_loader  # here, because main() reports its absence once

        self.espeak = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.espeak.espeak_Initialize(self._RETRIEVAL_SYNCHRONOUS, 0, data, self._DO_NOT_EXIT)
        if self.rate <= 0:
            raise ValueError(f"eSpeak NG cannot read its data in {data.decode()}")
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._pieces, self._callback = [], signature(self._receive)  # kept: C has no reference to it
        self.espeak.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, _events):
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def choose(self, speaker, seed):
        """Take the speaker's voice; ``seed`` is that of the breath and flutter in it.

        Raises:
            ValueError: if this eSpeak NG has no such voice.
        """
        if self.espeak.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise ValueError(f"this eSpeak NG has no voice {speaker.voice}")
        self.espeak.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        settings = {self._RATE: speaker.rate, self._PITCH: speaker.pitch, self._RANGE: speaker.pitch_range}
        settings[self._WORD_GAP] = WORD_GAP
        for parameter, value in settings.items():
            self.espeak.espeak_SetParameter(parameter, value, 0)

    def say(self, text):
        """Return the speech as float64 samples in [-1, 1] at 16 kHz."""
        self._pieces.clear()
        content = text.encode()
        none = ctypes.c_void_p()
        self.espeak.espeak_Synth(
            content, ctypes.c_size_t(len(content) + 1), 0, self._CHARACTERS, 0, self._UTF8, none, none
        )
        self.espeak.espeak_Synchronize()
        samples = np.concatenate([np.zeros(0, np.int16), *self._pieces]) / 32768.0
        return soxr.resample(samples, self.rate, SAMPLE_RATE)


def read_sentences(synthesiser, utterance):
    """Return the samples and the text of as many sentences as come closest to the target length."""
    speech, texts = np.zeros(0), []
    for sentence in utterance.sentences:
        piece = synthesiser.say(sentence)
        length = (len(speech) + len(piece)) / SAMPLE_RATE
        filled = len(speech) / SAMPLE_RATE
        if filled >= SHORTEST and (length > LONGEST or length - utterance.target > utterance.target - filled):
            break
        speech, texts = np.concatenate([speech, piece]), [*texts, sentence]
    return speech, " ".join(map(transcript, texts))


def synthesise(utterance, folder):
    """Write the wav file of an utterance; return its manifest entry.

    Runs in a process of its own: eSpeak carries state from one utterance to the next, so that a shared process would
    make the bytes depend on which utterances came before.
    """
    synthesiser = Synthesiser()
    synthesiser.choose(utterance.speaker, utterance.seed)
    speech, text = read_sentences(synthesiser, utterance)
    noise = np.random.default_rng(utterance.seed).standard_normal(len(speech))
    samples = at_level(speech, utterance.level) + at_level(noise, utterance.floor)
    return entry(folder, utterance.name, samples, text=text, speaker=utterance.speaker.voice)


def at_level(samples, decibels):
    """Return the samples scaled to a root mean square of ``decibels`` relative to full scale."""
    return samples * (10 ** (decibels / 20) / max(np.sqrt(np.mean(np.square(samples))), 1e-9))


def entry(folder, name, samples, **fields):
    """Write 16-bit samples (float, [-1, 1]) to ``folder/audio/name.wav``; return the manifest entry."""
    path = Path(folder, "audio", f"{name}.wav")
    pcm = np.round(np.clip(samples, -1.0, 1.0) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm.tobytes())
    return {"audio_filepath": f"audio/{name}.wav", "duration": round(len(pcm) / SAMPLE_RATE, 6), **fields}


def make_noises(folder, seed, speech, seconds=15):
    """Write the noise files; return their manifest entries.

    Args:
        folder: the corpus.
        seed: of the random numbers.
        speech: manifest entries whose speech is mixed into babble.
        seconds: length of each file.
    """
    rng, count = np.random.default_rng([seed, 1]), seconds * SAMPLE_RATE
    time = np.arange(count) / SAMPLE_RATE
    noises = {}
    for name, slope in (("white", 0.0), ("pink", 0.5), ("brown", 1.0)):
        noises[name] = coloured_noise(rng, count, slope)
    for name, mains in (("hum50", 50.0), ("hum60", 60.0)):
        noises[name] = sum(np.sin(2 * np.pi * mains * k * time + rng.uniform(0, 6)) / k for k in range(1, 12))
    noises["fan"] = coloured_noise(rng, count, 0.8) * (1 + 0.5 * np.sin(2 * np.pi * 7.0 * time))
    noises["crackle"] = coloured_noise(rng, count, 0.2) * (rng.random(count) < 0.002)
    for index in range(3):
        noises[f"babble{index}"] = babble(rng, folder, speech, count)
    # NeMo draws a piece of noise again until its sum is positive: the offset of -60 dB spares the loader that loop
    return [
        entry(folder, f"noise-{name}", at_level(samples, -26.0) + 1e-3, text="-") for name, samples in noises.items()
    ]


def coloured_noise(rng, count, slope):
    """Return Gaussian noise whose amplitude falls as frequency to the power of ``slope``, above 20 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 20.0)
    return np.fft.irfft(spectrum / frequency**slope, count)


def babble(rng, folder, speech, count, voices=6):
    """Return ``count`` samples of several utterances at once, each repeated to the full length."""
    total = np.zeros(count)
    for index in rng.choice(len(speech), size=min(voices, len(speech)), replace=False):
        with wave.open(str(Path(folder, speech[index]["audio_filepath"])), "rb") as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
        total += at_level(np.resize(samples, count), -26.0)
    return total


def write_lines(path, items):
    """Write one JSON object per line to ``path``, whole or not at all."""
    temporary = Path(f"{path}.partial")
    temporary.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    os.replace(temporary, path)


def is_complete(folder, settings):
    """Return whether ``folder`` holds the corpus of these settings, every file included."""
    try:
        if json.loads(Path(folder, SETTINGS).read_text(encoding="utf-8")) != settings:
            return False
        for split in SPLITS:
            lines = Path(folder, f"{split}_manifest.json").read_text(encoding="utf-8").splitlines()
            if not all(Path(folder, json.loads(line)["audio_filepath"]).is_file() for line in lines):
                return False
    except (OSError, ValueError):
        return False
    return True


def clear(folder):
    """Remove what an earlier run of this script left, its completion mark first, and nothing else."""
    Path(folder, SETTINGS).unlink(missing_ok=True)
    for split in SPLITS:
        Path(folder, f"{split}_manifest.json").unlink(missing_ok=True)
        for path in Path(folder, "audio").glob(f"{split}-*.wav"):
            path.unlink()
    Path(folder, "audio").mkdir(parents=True, exist_ok=True)


def synthesise_all(utterances, folder, workers, progress=True):
    """Return the manifest entries of the utterances, in order; each is made by a fresh process."""
    # fork is quicker and safe here: this script starts no threads
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers, maxtasksperchild=1) as pool:
        jobs = pool.imap(_Job(folder), utterances, chunksize=1)
        bar = tqdm(utterances, unit=" utterances", disable=not progress)
        try:
            return [jobs.next(PATIENCE) for _ in bar]
        except multiprocessing.TimeoutError:  # a pool never stops waiting for a process that crashed
            raise ValueError(f"eSpeak NG has not finished an utterance within {PATIENCE} seconds") from None


@dataclass(frozen=True)
class _Job:
    """``synthesise`` with its folder, in a form that a process can be sent."""

    folder: str

    def __call__(self, utterance):
        return synthesise(utterance, self.folder)


def make_corpus(folder, minutes=30.0, seed=0, workers=None, progress=True):
    """Make the corpus, or leave it alone if it is there with the same settings.

    Args:
        folder: where to; it is made if need be.
        minutes: about how much train speech, without the third that pauses add; validation and test get a tenth of it
            each, at least 20 seconds.
        seed: of everything random.
        workers: processes; None: one per CPU core.
        progress: whether to show a progress bar.

    Returns:
        Seconds of audio per split, and True if the corpus was made, False if it was there.

    Raises:
        ValueError: if ``minutes`` is not positive or eSpeak NG cannot be used.
    """
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes is {minutes}; it must be above 0")
    settings = {"recipe": RECIPE, "minutes": minutes, "seed": seed, "espeakng-loader": _loader_version()}
    made = not is_complete(folder, settings)
    if made:
        clear(folder)
        entries = synthesise_all(plan_corpus(minutes, seed), folder, workers, progress)
        groups = {split: [item for item in entries if f"/{split}-" in item["audio_filepath"]] for split in SPLITS[:3]}
        groups["noise"] = make_noises(folder, seed, groups["train"])
        for split in SPLITS:
            write_lines(Path(folder, f"{split}_manifest.json"), groups[split])
        write_lines(Path(folder, SETTINGS), [settings])
    return {split: seconds_of(Path(folder, f"{split}_manifest.json")) for split in SPLITS}, made


def seconds_of(manifest: Path) -> float:
    """Return how many seconds of audio the entries of a manifest claim together."""
    from nemo.collections.asr.parts.utils.manifest_index import read_entries

    return sum(line.entry["duration"] for line in read_entries(manifest))


def _loader_version():
    try:
        return importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("the synthesiser is missing: pip install espeakng-loader") from None


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the corpus")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="minutes of train speech, without its pauses (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sentences and voices (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU core)")
    options = parser.parse_args(argv)
    if options.seed < 0 or (options.workers is not None and options.workers < 1):
        parser.error("--seed must be at least 0 and --workers at least 1")
    require_patches(__file__)
    try:
        seconds, made = make_corpus(options.output, options.minutes, options.seed, options.workers)
    except (ValueError, OSError) as error:
        return report_error(__file__, error)
    lengths = ", ".join(f"{value / 60:.1f} min {split}" for split, value in seconds.items())
    print(f"{options.output}: {lengths} ({'made now' if made else 'complete already, used again'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
