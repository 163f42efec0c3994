# SPDX-License-Identifier: Apache-2.0
import json
import os
import re

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.data import corpus_statistics
from nemo.collections.asr.data.corpus_statistics import Moments
from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import load_fixed_statistics
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

PREPROCESSOR = "_target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"


@pytest.fixture(scope="module")
def stats(load_example):
    return load_example("compute_feature_stats")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Eight files of 0.02 to 3 s of coloured noise at different levels; one at 22050 Hz, one read in part."""
    folder = tmp_path_factory.mktemp("speech")
    rng, lines = np.random.default_rng(0), []
    for index, seconds in enumerate([3.0, 1.0, 0.02, 2.0, 0.5, 1.5, 0.25, 1.0]):
        rate = 22050 if index == 3 else 16000
        samples = np.convolve(rng.standard_normal(int(rate * seconds)), np.ones(index + 1), mode="same")
        soundfile.write(folder / f"{index}.wav", samples * 0.1 / (index + 1), rate)
        lines.append({"audio_filepath": f"{index}.wav", "duration": seconds, "text": ""})
    lines[0].update(offset=0.7, duration=1.3)
    return write(folder, *lines)


def write(folder, *lines):
    path = folder / "manifest.json"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines) + "\n")
    return path


def features_of(manifest, **settings):
    """The features [D, T] of each utterance of a manifest, float64, by NeMo's own reader and preprocessor."""
    settings = {"normalize": "NA", "features": 80, "n_fft": 512, "window_size": 0.025, **settings}
    module = AudioToMelSpectrogramPreprocessor(pad_to=0, dither=0.0, **settings).eval()
    found = []
    for item in map(json.loads, manifest.read_text().strip().splitlines()):
        path = os.path.join(manifest.parent, item["audio_filepath"])
        audio = AudioSegment.from_file(path, 16000, offset=item.get("offset", 0), duration=item["duration"])
        signal = torch.from_numpy(audio.samples)[None].float()
        features, lengths = module(input_signal=signal, length=torch.tensor([signal.shape[1]]))
        found.append(features[0, :, : lengths[0]].double().numpy())
    return found


def mean_and_std(utterances):
    """Mean and standard deviation [D] of utterances [D, T], by two passes over all of them at once."""
    frames = np.concatenate(utterances, axis=1)
    return frames.mean(axis=1), frames.std(axis=1, ddof=1)


def assert_statistics(path, mean, std):
    found = load_fixed_statistics(path)
    np.testing.assert_allclose(found["fixed_mean"], mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["fixed_std"], std, rtol=0, atol=1e-6)


def run(stats, folder, *options):
    """Run the script; return the arrays of principal components that it wrote, if any."""
    assert stats.main(["--output", str(folder / "stats.yaml"), *map(str, options)]) == 0
    if "--pca" in options:
        with np.load(folder / "pca.npz") as file:
            return dict(file)


class TestStatistics:
    def test_equals_two_passes(self, stats, manifest, tmp_path):
        run(stats, tmp_path, "--manifest", manifest)
        utterances = features_of(manifest)
        assert_statistics(tmp_path / "stats.yaml", *mean_and_std(utterances))
        frames = sum(features.shape[1] for features in utterances)
        assert f"8 utterances, {(1.3 + 6.27) / 3600:.4f} h, {frames} frames" in (tmp_path / "stats.yaml").read_text()
        assert os.listdir(tmp_path) == ["stats.yaml"]

    def test_preprocessor_of_a_config_and_several_manifests(self, stats, manifest, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text(
            "model:\n  sample_rate: 16000\n  train_ds: {manifest_filepath: '???'}\n  preprocessor:\n"
            f"    {PREPROCESSOR}\n    sample_rate: ${{model.sample_rate}}\n    normalize: ???\n    features: 24\n"
            "    n_fft: 512\n    window_size: 0.032\n    window_stride: 0.016\n    dither: 1.0\n    pad_to: 16\n"
        )
        run(stats, tmp_path, "--manifest", manifest, manifest, "--config", config)
        utterances = features_of(manifest, features=24, window_size=0.032, window_stride=0.016)
        assert_statistics(tmp_path / "stats.yaml", *mean_and_std(utterances * 2))

    @given(
        lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
        offset=st.sampled_from([0.0, -11.0, 1e4]),
        seed=st.integers(0, 99),
    )
    def test_merging_is_exact(self, lengths, offset, seed):
        rng = np.random.default_rng(seed)
        pieces = [rng.standard_normal((3, length)) + offset for length in lengths]
        total = Moments()
        for piece in pieces:
            total = total.merged(Moments.of(piece))
        assert total.count == sum(lengths)
        if total.count > 1:
            found, (mean, std) = total.statistics(), mean_and_std(pieces)
            np.testing.assert_allclose(found["fixed_mean"], mean, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(found["fixed_std"], std, rtol=1e-9)


def targets_by_hand(utterances, combine, normalize):
    """The targets [S, V] of utterances [D, T], frame after frame."""
    mean, std = (values[:, None] for values in mean_and_std(utterances))
    targets = []
    for features in utterances:
        if normalize == "per_feature" and features.shape[1] > 1:
            mean, std = features.mean(axis=1, keepdims=True), features.std(axis=1, ddof=1, keepdims=True) + 1e-5
        features = (features - mean) / std
        for first in range(0, features.shape[1] - combine + 1, combine):
            targets.append(np.concatenate([features[:, first + frame] for frame in range(combine)]))
    return np.array(targets)


class TestPrincipalComponents:
    @pytest.mark.parametrize("combine, components", [(2, 64), (4, 5)])
    @pytest.mark.parametrize("normalize", ["per_feature", "NA"])
    def test_equals_the_eigenvectors_of_all_targets_at_once(
        self, stats, manifest, tmp_path, monkeypatch, normalize, combine, components
    ):
        monkeypatch.setattr(corpus_statistics, "UTTERANCES_AT_ONCE", 3)  # so that something is merged
        options = ["--target_normalize", normalize, "--combine_time_steps", combine, "--components", components]
        found = run(stats, tmp_path, "--manifest", manifest, "--pca", tmp_path / "pca.npz", *options)
        targets = targets_by_hand(features_of(manifest), combine, normalize)
        covariance = np.cov(targets.T)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1][:components], vectors.T[::-1][:components]
        np.testing.assert_allclose(found["eigenvalues"], values, rtol=1e-5)
        np.testing.assert_allclose(found["variance_share"], values / np.trace(covariance), rtol=1e-5)
        leading = slice(0, 5)  # further down eigenvalues are near each other, and eigenvectors ill-defined
        likeness = np.abs((found["components"][leading] * vectors[leading]).sum(axis=1))
        np.testing.assert_allclose(likeness, 1, atol=1e-5)
        np.testing.assert_allclose(found["components"] @ found["components"].T, np.eye(components), atol=1e-9)
        settings = [found[name].item() for name in ("combine_time_steps", "features", "normalization", "count")]
        assert settings == [combine, 80, normalize, len(targets)]

    @pytest.mark.parametrize("normalize", ["per_feature", "NA"])
    def test_the_number_of_workers_changes_no_digit(self, stats, manifest, tmp_path, monkeypatch, normalize):
        monkeypatch.setattr(corpus_statistics, "UTTERANCES_AT_ONCE", 3)
        options = ["--manifest", manifest, "--pca", tmp_path / "pca.npz", "--combine_time_steps", 2]
        options += ["--target_normalize", normalize]
        written = []
        for workers in (0, 1, 2):
            run(stats, tmp_path, *options, "--workers", workers)
            written.append([(tmp_path / name).read_bytes() for name in ("stats.yaml", "pca.npz")])
        assert written[0] == written[1] == written[2]
        run(stats, tmp_path, "--manifest", manifest)
        assert (tmp_path / "stats.yaml").read_bytes() == written[0][0]

    def test_the_command_line_takes_precedence_over_the_config(self, stats, manifest, tmp_path, capsys):
        config = tmp_path / "config.yaml"
        config.write_text(
            f"model:\n  target_normalize: NA\n  preprocessor:\n    {PREPROCESSOR}\n    features: 12\n"
            "  encoder: {subsampling_factor: 4}\n"
            "  quantizer: {combine_time_steps: '${model.encoder.subsampling_factor}'}\n"
        )
        options = ["--manifest", manifest, "--pca", tmp_path / "pca.npz", "--config", config, "--components", 3]
        found = run(stats, tmp_path, *options)
        assert (found["combine_time_steps"], found["normalization"], found["components"].shape) == (4, "NA", (3, 48))
        assert "Utterances shorter than one target (4 frames), which add nothing: 1." in capsys.readouterr().out
        found = run(stats, tmp_path, *options, "--combine_time_steps", 1, "--target_normalize", "per_feature")
        assert (found["combine_time_steps"], found["normalization"]) == (1, "per_feature")
        assert "shorter" not in capsys.readouterr().out
        assert stats.read_target_settings(None) == ("per_feature", 8)


NOISE = np.random.default_rng(0).standard_normal(16000) * 0.1
PCA = ["--pca", "pca.npz"]
CONFIGS = {"empty.yaml": "model: {}", "missing.yaml": "model: {preprocessor: {sample_rate: '???'}}"}
CONFIGS["invalid.yaml"] = "model: {preprocessor: {features: many}}"
AUDIO = '{"audio_filepath": "a.wav", "duration": 1}'


class TestErrors:
    """Each ends in one line that names the culprit, status 2, and no output file."""

    @pytest.mark.parametrize(
        "lines, audio, options, message",
        [
            (None, NOISE, [], "manifest.json"),
            (["", "  "], NOISE, [], "manifest.json"),
            (["", "not json"], NOISE, [], "line 2"),
            (["", '{"audio_filepath": 3}'], NOISE, [], "line 2"),
            ([AUDIO], None, [], "line 1: .* a.wav"),
            ([AUDIO], "no audio", [], "a.wav"),
            ([AUDIO], "no audio", PCA, "a.wav"),
            ([AUDIO], NOISE, [*PCA, "--components", "13"], "--components 13 needs 14 targets"),
            ([AUDIO], 0 * NOISE, [], r"fixed_std\[0\] is 0.0"),
            ([AUDIO], NOISE[:20], [], "0 feature frames"),
            ([AUDIO], NOISE, ["--config", "empty.yaml"], "model.preprocessor"),
            ([AUDIO], NOISE, ["--config", "missing.yaml"], "sample_rate"),
            ([AUDIO], NOISE, ["--config", "invalid.yaml"], "cannot make the preprocessor"),
        ],
    )
    def test_a_run_that_fails(self, stats, capsys, tmp_path, monkeypatch, lines, audio, options, message):
        monkeypatch.chdir(tmp_path)
        if lines is not None:
            write(tmp_path, *lines)
        if isinstance(audio, str):
            (tmp_path / "a.wav").write_text(audio)
        elif audio is not None:
            soundfile.write(tmp_path / "a.wav", audio, 16000)
        for name, content in CONFIGS.items():
            (tmp_path / name).write_text(content)
        before = sorted(os.listdir(tmp_path))
        assert stats.main(["--manifest", "manifest.json", "--output", "stats.yaml", *options]) == 2
        assert sorted(os.listdir(tmp_path)) == before
        assert re.search(message, capsys.readouterr().err)
