# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import random
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

SPLITS = ["train", "validation", "test", "noise"]
MINUTES = 0.5


@pytest.fixture(scope="module")
def maker(load_example):
    pytest.importorskip("espeakng_loader")
    return load_example("make_speech_corpus")


def run(maker, folder, *arguments):
    """Run the script as users do: with a process of its own."""
    command = [sys.executable, maker.__file__, "--output", str(folder), "--minutes", str(MINUTES), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(maker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "made"
    result = run(maker, folder, "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr  # the progress bar
    return folder


def entries(folder, split):
    return [json.loads(line) for line in (folder / f"{split}_manifest.json").read_text("utf-8").splitlines()]


def checksums(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples_of(folder, item):
    with wave.open(str(folder / item["audio_filepath"])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.mark.integration
class TestCorpus:
    @pytest.mark.parametrize("split", SPLITS)
    def test_manifests_say_what_the_files_hold(self, corpus, split):
        found = entries(corpus, split)
        for item in found:
            samples = samples_of(corpus, item)
            assert item["duration"] == pytest.approx(len(samples) / 16000, abs=1e-6)
            assert 2.0 <= item["duration"] <= 16.0
            assert item["text"]
            assert 200 < np.abs(samples.astype(int)).max() and samples.std() > 100
        assert len({item["audio_filepath"] for item in found}) == len(found)
        assert {f"audio/{path.name}" for path in (corpus / "audio").glob(f"{split}-*")} == {
            item["audio_filepath"] for item in found
        }

    def test_has_about_the_length_asked_for(self, corpus):
        assert sum(item["duration"] for item in entries(corpus, "train")) == pytest.approx(60 * MINUTES, rel=0.4)

    def test_its_voices_speak_at_different_levels(self, maker, corpus):
        train = entries(corpus, "train")
        assert {item["speaker"] for item in train} == set(maker.VOICES)
        levels = [20 * np.log10(samples_of(corpus, item).std() / 32768) for item in train]
        assert -31 < min(levels) < max(levels) < -21
        assert max(levels) - min(levels) > 0.5

    @pytest.mark.parametrize("split", SPLITS[:3])
    def test_texts_are_plain_and_slow_enough_for_a_character_in_80_ms(self, corpus, split):
        for item in entries(corpus, split):
            assert re.fullmatch(r"[a-z']+( [a-z']+)*", item["text"])
            doubled = sum(first == second for first, second in zip(item["text"], item["text"][1:]))
            assert len(item["text"]) + doubled < item["duration"] / 0.08

    def test_nemo_reads_the_manifests(self, corpus):
        from nemo.collections.asr.data.ssl_dataset import load_noise_audio, load_noise_manifest

        noises = load_noise_manifest(str(corpus / "noise_manifest.json"))
        assert len(noises) == 10
        noise, length = load_noise_audio(noises[0], 16000, max_audio_len=32000)
        assert (noise.shape, int(length)) == ((32000,), 32000)
        for item in noises:  # NeMo draws a piece again until its sum is above 0
            assert samples_of(corpus, item).astype(float).mean() > 0

    def test_same_settings_same_bytes_for_any_number_of_processes(self, maker, corpus, tmp_path):
        assert run(maker, tmp_path / "again", "--workers", "5").returncode == 0
        assert checksums(tmp_path / "again") == checksums(corpus)

    def test_complete_corpus_is_used_again(self, maker, corpus):
        stamps = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
        result = run(maker, corpus)
        assert "used again" in result.stdout
        assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == stamps

    @pytest.mark.parametrize("damage", ["settings", "audio", "manifest"])
    def test_incomplete_corpus_is_made_anew(self, maker, corpus, damage):
        before = checksums(corpus)
        if damage == "settings":  # interrupted before the end, after a longer corpus
            (corpus / "corpus.json").unlink()
            (corpus / "audio/train-99999.wav").write_bytes(b"left over")
        else:
            next(corpus.glob("audio/train-*" if damage == "audio" else "train_manifest.json")).unlink()
        assert "made now" in run(maker, corpus).stdout
        assert checksums(corpus) == before

    def test_leaves_the_files_of_others(self, maker, corpus, tmp_path):
        (tmp_path / "audio").mkdir()
        (tmp_path / "audio/mine.wav").write_text("mine")
        (tmp_path / "notes.txt").write_text("mine")
        assert run(maker, tmp_path, "--seed", "1").returncode == 0
        assert (tmp_path / "audio/mine.wav").read_text() == (tmp_path / "notes.txt").read_text() == "mine"
        assert checksums(tmp_path)["audio/train-00000.wav"] != checksums(corpus)["audio/train-00000.wav"]


class TestPlan:
    def test_each_split_has_sentences_of_its_own_and_a_held_out_voice(self, maker):
        plan = maker.plan_corpus(20, 0)
        splits = {name: [item for item in plan if item.name.startswith(name)] for name in SPLITS[:3]}
        texts = [{sentence for item in items for sentence in item.sentences} for items in splits.values()]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
        voices = {name: {item.speaker.voice for item in items} for name, items in splits.items()}
        assert voices["train"] == set(maker.VOICES)
        for name, held_out in maker.HELD_OUT_VOICES.items():
            assert voices[name] == {*maker.VOICES, *held_out}
        assert sum(item.target for item in splits["train"]) == pytest.approx(1200, abs=14)

    def test_is_a_function_of_the_seed(self, maker):
        assert maker.plan_corpus(1, 3) == maker.plan_corpus(1, 3) != maker.plan_corpus(1, 4)

    @pytest.mark.integration
    def test_espeak_has_every_voice(self, maker):
        synthesiser = maker.Synthesiser()
        for speaker in maker.make_speakers(random.Random(0), sum(maker.HELD_OUT_VOICES.values(), maker.VOICES)):
            synthesiser.choose(speaker, seed=0)
            assert len(synthesiser.say("a short test")) > 4000

    def test_espeak_refuses_an_unknown_voice(self, maker):
        with pytest.raises(ValueError, match="no voice xx-nonsense"):
            maker.Synthesiser().choose(maker.Speaker("xx-nonsense", 150, 50, 50), seed=0)


class TestErrors:
    @pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
    def test_minutes(self, maker, tmp_path, capsys, minutes):
        assert maker.main(["--output", str(tmp_path / "none"), f"--minutes={minutes}"]) == 2
        assert "minutes is" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()

    def test_missing_synthesiser(self, maker, tmp_path, capsys, monkeypatch):
        def missing(name):
            raise maker.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(maker.importlib.metadata, "version", missing)
        assert maker.main(["--output", str(tmp_path)]) == 2
        assert "pip install espeakng-loader" in capsys.readouterr().err

    def test_a_synthesis_that_never_ends(self, maker, tmp_path, monkeypatch):
        monkeypatch.setattr(maker, "PATIENCE", 0.05)
        monkeypatch.setattr(maker, "synthesise", lambda utterance, folder: __import__("time").sleep(60))
        with pytest.raises(ValueError, match="not finished"):
            maker.synthesise_all(maker.plan_corpus(0.1, 0)[:1], str(tmp_path), workers=1, progress=False)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_noise_falls_with_its_slope(maker, slope):
    spectrum = np.abs(np.fft.rfft(maker.coloured_noise(np.random.default_rng(0), 160000, slope))) ** 2
    low, high = spectrum[4000:4200].mean(), spectrum[40000:42000].mean()  # 400 Hz and 4 kHz
    assert np.log10(low / high) == pytest.approx(2 * slope, abs=0.15)
