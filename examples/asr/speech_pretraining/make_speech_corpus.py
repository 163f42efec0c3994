# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Make a multi-voice speech corpus on any machine, in seconds and without a download.

    python make_speech_corpus.py --output DIR [--minutes 20] [--seed 0]

The eSpeak NG synthesiser of the PyPI package ``espeakng-loader`` reads sentences of a small grammar in five languages
with some fifty voices. DIR gets 16 kHz mono wav files and NeMo manifests with relative paths: ``train_manifest.json``,
``validation_manifest.json`` (a tenth of the length, other sentences, half of them by voices that are not in train) and
``noise_manifest.json``. The same settings give the same bytes, whatever the number of processes. A corpus that is
complete is used again; one that was interrupted, or made with other settings, is made anew.
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
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr
from script_tools import manifest_seconds, report_error, require_patches
from tqdm import tqdm

SAMPLE_RATE = 16000  # Hz
SHORTEST, LONGEST = 2.0, 8.0  # seconds of an utterance
RECIPE = 2  # raise it when this script's output changes, so that corpora on disk are made anew
PATIENCE = 120  # seconds to wait for one utterance
SETTINGS = "corpus.json"  # written last: its presence says that the corpus is complete
SPLITS = ("train", "validation", "noise")

# Per language: the sentence patterns, then the phrases that fill them.
GRAMMARS = {
    "en": (
        [
            "{who} {does} {what} {where}.",
            "{when}, {who} {does} {what}.",
            "{who} {does} {what} {where} {when}, and {who2} {does2} {what2}.",
            "Why has nobody noticed that {who} {does} {what} {when}?",
            "{who} says that {who2} {does} {what} {where}.",
            "If {who} {does} {what}, then {who2} {does2} {what2} {where}.",
            "There were {count} people {where} {when}.",
        ],
        {
            "who": "the old baker|my younger sister|a tired engineer|the captain|our neighbour|every good doctor|the "
            "shy painter|a famous singer|the night watchman|her grandfather|the new teacher|a clever fox|the village "
            "blacksmith|that quiet librarian|the ship's cook|a young farmer|somebody|the chess player|an honest judge"
            "|the last visitor|Professor Higgs|little Emma|the whole orchestra|a curious child",
            "does": "carries|forgets|paints|sells|repairs|finds|hides|describes|borrows|breaks|measures|collects|loves"
            "|watches|builds|throws away|asks about|laughs at|worries about|pulls|designs|explains|cleans|weighs",
            "what": "the wooden bridge|a jar of honey|three heavy boxes|an unusual question|the broken clock|fresh "
            "bread|a map of the island|the yellow curtains|an enormous fish|the first chapter|a bag of oranges|the "
            "violin|a strange machine|two silver spoons|the theory of tides|warm woollen gloves|a pile of letters|the "
            "garden gate|some very cheap shoes|the weather report|a bicycle wheel|an expensive vase|the long queue"
            "|purple ink",
            "where": "behind the church|in the narrow street|near the harbour|under a chestnut tree|at the railway "
            "station|on the roof|in front of the museum|beyond the hills|inside the cave|beside the frozen lake|at "
            "the edge of town|in a crowded cafe|by the window|on the third floor|across the valley|outside",
            "when": "early in the morning|before the storm|every Thursday|after lunch|at midnight|last winter|while "
            "it rains|once a year|in the spring|as usual|during the concert|two days ago|at half past seven|on "
            "holidays|from time to time|right now",
            "count": "four|eleven|twenty six|a hundred and nine|at least thirty|nearly two thousand|six or seven"
            "|forty eight|far too many",
        },
    ),
    "de": (
        [
            "{who} {does} {what} {where}.",
            "{when} {does} {who} {what}.",
            "{who} {does} {what}, und {who2} {does2} {what2} {where}.",
            "Warum {does} {who} {what} {where}?",
        ],
        {
            "who": "der Nachbar|die Lehrerin|ein junger Koch|meine Tante|der Schaffner|das kleine Kind|die Ärztin|ein "
            "alter Fischer|unser Bürgermeister|die Nachtigall",
            "does": "kauft|sucht|vergisst|zeichnet|öffnet|beschreibt|versteckt|bringt|zählt|verkauft|prüft|malt",
            "what": "den roten Koffer|eine lange Leiter|frische Brötchen|das schwere Buch|zwei Fahrkarten|einen Korb "
            "Äpfel|die blaue Tür|ein seltsames Geräusch|den letzten Zug|viele Briefe|das Frühstück|einen Schlüssel",
            "where": "am Bahnhof|hinter dem Haus|auf dem Markt|im tiefen Wald|neben der Brücke|vor der Schule|an der "
            "Küste|in der Küche",
            "when": "heute|gestern Abend|jeden Sonntag|im Sommer|nach dem Regen|manchmal|vor der Reise|um halb acht",
        },
    ),
    "es": (
        [
            "{who} {does} {what} {where}.",
            "{when}, {who} {does} {what}.",
            "{who} {does} {what} y {who2} {does2} {what2} {where}.",
            "¿Por qué {does} {who} {what} {where}?",
        ],
        {
            "who": "el panadero|mi hermana|un viejo marinero|la profesora|el vecino|una niña curiosa|el jardinero|la "
            "cantante|nuestro abuelo|el capitán",
            "does": "compra|pinta|olvida|busca|lleva|vende|describe|guarda|rompe|mira|arregla|encuentra",
            "what": "una caja de madera|el reloj roto|tres naranjas|la puerta verde|un libro antiguo|las llaves|el "
            "último tren|una carta larga|el pan caliente|dos sillas|la guitarra|un mapa del mar",
            "where": "en la plaza|cerca del puerto|detrás de la iglesia|en el mercado|junto al río|bajo el puente|en "
            "la estación|al lado de la ventana",
            "when": "por la mañana|cada jueves|después de la lluvia|anoche|en verano|de vez en cuando|antes del viaje"
            "|a las siete y media",
        },
    ),
    "fr": (
        [
            "{who} {does} {what} {where}.",
            "{when}, {who} {does} {what}.",
            "{who} {does} {what}, puis {who2} {does2} {what2} {where}.",
            "Pourquoi {who} {does} {what} {where}?",
        ],
        {
            "who": "le boulanger|ma cousine|un vieux pêcheur|la voisine|le facteur|une jeune actrice|notre professeur"
            "|le cuisinier|la petite fille|un voyageur",
            "does": "achète|cherche|oublie|dessine|ouvre|raconte|cache|porte|compte|vend|regarde|répare",
            "what": "une valise rouge|le journal|trois pommes vertes|la grande échelle|un livre rare|les fenêtres|le "
            "dernier train|une longue histoire|du pain frais|deux billets|la clé du jardin|un bruit étrange",
            "where": "à la gare|derrière la maison|au marché|dans la forêt|près du pont|devant l'école|au bord de la "
            "mer|dans la cuisine",
            "when": "ce matin|hier soir|chaque dimanche|en été|après la pluie|parfois|avant le voyage|à midi",
        },
    ),
    "it": (
        [
            "{who} {does} {what} {where}.",
            "{when} {who} {does} {what}.",
            "{who} {does} {what} e {who2} {does2} {what2} {where}.",
            "Perché {who} {does} {what} {where}?",
        ],
        {
            "who": "il fornaio|mia sorella|un vecchio pescatore|la maestra|il vicino|una ragazza allegra|il postino|la "
            "cantante|nostro zio|il capitano",
            "does": "compra|cerca|dimentica|disegna|apre|racconta|nasconde|porta|conta|vende|guarda|ripara",
            "what": "una valigia rossa|il giornale|tre arance|la lunga scala|un libro raro|le finestre|l'ultimo treno"
            "|una storia antica|il pane caldo|due biglietti|la chiave|un rumore strano",
            "where": "alla stazione|dietro la casa|al mercato|nel bosco|vicino al ponte|davanti alla scuola|sulla "
            "spiaggia|in cucina",
            "when": "stamattina|ieri sera|ogni domenica|d'estate|dopo la pioggia|a volte|prima del viaggio|a mezzogiorno",
        },
    ),
}
# accents that read each language, English more than the others
ACCENTS = {
    "en": ["en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbcwmd", "en-us-nyc"],
    "de": ["de"],
    "es": ["es", "es-419"],
    "fr": ["fr", "fr-be"],
    "it": ["it"],
}
# eSpeak's voice variants (formants, pitch, roughness); the held-out ones speak in validation only
TRAIN_VARIANTS = (
    "m1 m2 m3 m4 m5 m7 m8 f1 f2 f3 f4 Andy Annie belinda Alex Lee Michael Mike Gene Marco Andrea linda adam benjamin "
    "boris david ed edward gustave ian john max michel miguel pablo paul rob robert sandro steph2 travis victor zac "
    "klatt3 klatt4 aunty caleb norbert"
).split()
HELD_OUT_VARIANTS = "f5 m6 Alicia Storm quincy shelby".split()


@dataclass(frozen=True)
class Speaker:
    """A voice: ``rate`` in words per minute, ``pitch`` and ``pitch_range`` on eSpeak's scale of 0 to 100."""

    language: str
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


def make_speakers(rng, variants):
    """Return one ``Speaker`` per variant; every second one speaks English."""
    others = [language for language in GRAMMARS if language != "en"]
    speakers = []
    for index, variant in enumerate(variants):
        language = others[index // 2 % len(others)] if index % 2 else "en"
        voice = f"{rng.choice(ACCENTS[language])}+{variant}"
        speakers.append(Speaker(language, voice, rng.randint(130, 190), rng.randint(30, 70), rng.randint(30, 75)))
    return speakers


def make_sentence(rng, language, split):
    """Return a sentence of the split: its checksum gives every sentence to train (9 in 10) or validation."""
    patterns, phrases = GRAMMARS[language]
    options = {slot: text.split("|") for slot, text in phrases.items()}
    while True:
        words = {slot + suffix: rng.choice(choice) for slot, choice in options.items() for suffix in ("", "2")}
        sentence = rng.choice(patterns).format(**words)
        sentence = sentence[0].upper() + sentence[1:]
        if (zlib.crc32(sentence.encode()) % 10 == 0) == (split == "validation"):
            return sentence


def plan_split(rng, split, seconds, speakers):
    """Return the utterances of a split, about ``seconds`` of speech in all; the speakers take turns."""
    utterances, planned, turns = [], 0.0, []
    while planned < seconds:
        turns = turns or rng.sample(speakers, len(speakers))
        speaker, target = turns.pop(), rng.uniform(3.0, 7.5)
        sentences = tuple(make_sentence(rng, speaker.language, split) for _ in range(10))
        name = f"{split}-{len(utterances):05d}"
        level, floor = rng.uniform(-30.0, -22.0), rng.uniform(-75.0, -55.0)
        utterances.append(Utterance(name, speaker, sentences, target, level, floor, rng.randrange(2**31)))
        planned += target
    return utterances


def plan_corpus(minutes, seed):
    """Return the train and the validation utterances, in that order."""
    rng = random.Random(seed)
    known, unknown = make_speakers(rng, TRAIN_VARIANTS), make_speakers(rng, HELD_OUT_VARIANTS)
    train = plan_split(rng, "train", 60 * minutes, known)
    heard = rng.sample(known, len(unknown))
    return train + plan_split(rng, "validation", max(6 * minutes, 20), heard + unknown)


class Synthesiser:
    """eSpeak NG by ctypes: text in, float64 samples at 16 kHz out. One per process: the library is not thread-safe."""

    _RETRIEVAL_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
    _RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER

    def __init__(self):
        import espeakng_loader  # here, because main() reports its absence once

        self.espeak = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.espeak.espeak_Initialize(self._RETRIEVAL_SYNCHRONOUS, 0, data, self._DO_NOT_EXIT)
        if self.rate <= 0:
            raise ValueError(f"eSpeak NG cannot read its data in {data.decode()}")
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._pieces, self._callback = [], signature(self._receive)  # kept: C holds no reference to it
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
    return speech[: int(LONGEST * SAMPLE_RATE)], " ".join(texts)


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
        except multiprocessing.TimeoutError:  # a pool waits for ever for a process that crashed
            raise ValueError(f"eSpeak NG has not finished an utterance within {PATIENCE} seconds") from None


@dataclass(frozen=True)
class _Job:
    """``synthesise`` with its folder, in a form that a process can be sent."""

    folder: str

    def __call__(self, utterance):
        return synthesise(utterance, self.folder)


def make_corpus(folder, minutes=20.0, seed=0, workers=None, progress=True):
    """Make the corpus, or leave it alone if it is there with the same settings.

    Args:
        folder: where to; it is made if need be.
        minutes: about how much train speech; validation gets a tenth of it, at least 20 seconds.
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
        groups = {split: [item for item in entries if f"/{split}-" in item["audio_filepath"]] for split in SPLITS[:2]}
        groups["noise"] = make_noises(folder, seed, groups["train"])
        for split in SPLITS:
            write_lines(Path(folder, f"{split}_manifest.json"), groups[split])
        write_lines(Path(folder, SETTINGS), [settings])
    return {split: manifest_seconds(Path(folder, f"{split}_manifest.json")) for split in SPLITS}, made


def _loader_version():
    try:
        return importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("the synthesiser is missing: pip install espeakng-loader") from None


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the corpus")
    parser.add_argument("--minutes", type=float, default=20.0, help="about how much train speech (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another corpus (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU core)")
    options = parser.parse_args(argv)
    if options.seed < 0 or (options.workers is not None and options.workers < 1):
        parser.error("--seed must be at least 0 and --workers at least 1")
    require_patches(__file__)
    try:
        seconds, made = make_corpus(options.output, options.minutes, options.seed, options.workers)
    except (ValueError, OSError) as error:
        return report_error(__file__, error, status=1)
    lengths = ", ".join(f"{value / 60:.1f} min {split}" for split, value in seconds.items())
    print(f"{options.output}: {lengths} ({'made now' if made else 'complete already, used again'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
