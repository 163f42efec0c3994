# SPDX-License-Identifier: Apache-2.0
import hashlib
import itertools
import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from fresh_process import run_python

SPLITS = ["train", "validation", "test", "noise"]
SPOKEN = SPLITS[:3]
MINUTES = 0.5


@pytest.fixture(scope="module")
def maker(load_example):
    pytest.importorskip("espeakng_loader")
    return load_example("make_speech_corpus")


@pytest.fixture(scope="module")
def corpus(maker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "made"
    run(maker, folder, "--workers", "2")
    return folder


def run(maker, folder, *arguments):
    """Run the script as users do, in a process of its own; returns what it prints."""
    done = run_python(maker.__file__, "--output", folder, "--minutes", MINUTES, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def entries(folder, split):
    return [json.loads(line) for line in (folder / f"{split}_manifest.json").read_text("utf-8").splitlines()]


def checksums(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples_of(folder, item):
    with wave.open(str(folder / item["audio_filepath"])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)


@pytest.mark.integration
class TestCorpus:
    @pytest.mark.parametrize("split", SPLITS)
    def test_a_manifest_has_what_the_files_hold(self, corpus, split):
        found = entries(corpus, split)
        for item in found:
            samples = samples_of(corpus, item)
            assert item["duration"] == pytest.approx(len(samples) / 16000, abs=1e-6)
            assert 2.0 <= item["duration"] <= 16.0 and item["text"]
            assert 200 < np.abs(samples).max() and samples.std() > 100
            if split != "noise":  # plain words, slow enough for a character in 80 ms
                assert re.fullmatch(r"[a-z']+( [a-z']+)*", item["text"])
                doubled = sum(first == second for first, second in zip(item["text"], item["text"][1:]))
                assert len(item["text"]) + doubled < item["duration"] / 0.08
        names = {item["audio_filepath"] for item in found}
        assert len(names) == len(found)
        assert names == {f"audio/{path.name}" for path in (corpus / "audio").glob(f"{split}-*")}

    def test_nemo_reads_the_noise(self, corpus):
        from nemo.collections.asr.data.ssl_dataset import load_noise_audio, load_noise_manifest

        noises = load_noise_manifest(str(corpus / "noise_manifest.json"))
        assert len(noises) == 10
        noise, length = load_noise_audio(noises[0], 16000, max_audio_len=32000)
        assert (noise.shape, int(length)) == ((32000,), 32000)
        for item in noises:  # NeMo draws a piece again until its sum is above 0
            assert samples_of(corpus, item).mean() > 0

    def test_same_settings_same_bytes_for_any_number_of_processes(self, maker, corpus, tmp_path):
        run(maker, tmp_path / "again", "--workers", "5")
        assert checksums(tmp_path / "again") == checksums(corpus)

    def test_a_complete_corpus_is_used_again(self, maker, corpus):
        stamps = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
        assert "used again" in run(maker, corpus)
        assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == stamps

    @pytest.mark.parametrize("lost", ["corpus.json", "audio/train-00000.wav", "train_manifest.json"])
    def test_an_incomplete_corpus_is_made_anew(self, maker, corpus, lost):
        before = checksums(corpus)
        (corpus / lost).unlink()
        (corpus / "audio/train-99999.wav").write_bytes(b"left of a longer corpus")
        assert "made now" in run(maker, corpus)
        assert checksums(corpus) == before

    def test_files_of_others_stay_and_another_seed_gives_another_corpus(self, maker, corpus, tmp_path):
        (tmp_path / "audio").mkdir()
        (tmp_path / "audio/mine.wav").write_text("mine")
        (tmp_path / "notes.txt").write_text("mine")
        run(maker, tmp_path, "--seed", "1")
        assert (tmp_path / "audio/mine.wav").read_text() == (tmp_path / "notes.txt").read_text() == "mine"
        assert checksums(tmp_path)["audio/train-00000.wav"] != checksums(corpus)["audio/train-00000.wav"]


def test_a_plan_is_a_function_of_the_seed_with_sentences_and_a_voice_for_each_split(maker):
    plan = maker.plan_corpus(20, 0)
    assert plan == maker.plan_corpus(20, 0) != maker.plan_corpus(20, 1)
    splits = {name: [item for item in plan if item.name.startswith(name)] for name in SPOKEN}
    texts = {name: {sentence for item in items for sentence in item.sentences} for name, items in splits.items()}
    assert not any(texts[one] & texts[other] for one, other in itertools.combinations(SPOKEN, 2))
    words = {name: set(re.findall(r"[a-z']+", " ".join(said).lower())) for name, said in texts.items()}
    assert words["validation"] | words["test"] <= words["train"] and 80 < len(words["train"]) < 200
    for name, items in splits.items():
        assert {item.speaker.voice for item in items} == {*maker.VOICES, *maker.HELD_OUT_VOICES.get(name, ())}
    assert sum(item.target for item in splits["train"]) == pytest.approx(1200, abs=14)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_bad_minutes_are_refused(maker, tmp_path, capsys, minutes):
    assert maker.main(["--output", str(tmp_path / "none"), f"--minutes={minutes}"]) == 2
    assert "minutes is" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_synthesis_that_never_ends_is_given_up(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "PATIENCE", 0.05)
    monkeypatch.setattr(maker, "synthesise", lambda utterance, folder: __import__("time").sleep(60))
    with pytest.raises(ValueError, match="not finished"):
        maker.synthesise_all(maker.plan_corpus(0.1, 0)[:1], str(tmp_path), workers=1, progress=False)
