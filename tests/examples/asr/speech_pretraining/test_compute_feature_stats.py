# SPDX-License-Identifier: Apache-2.0
import json
import os
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from fresh_process import run_python
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.data import corpus_statistics
from nemo.collections.asr.data.corpus_statistics import GroupStatistics, Moments, utterances_of
from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.modules.ssl_modules.quantizers import RandomProjectionVectorQuantizer
from nemo.collections.asr.parts.preprocessing.features import load_fixed_statistics, standardize_per_feature
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment


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
    path = folder / "manifest.json"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def two_pass(manifest, **settings):
    """Return mean, standard deviation and number of frames by the textbook, all features held in memory."""
    settings = {"features": 80, "n_fft": 512, "window_size": 0.025, **settings}
    module = AudioToMelSpectrogramPreprocessor(normalize="NA", pad_to=0, dither=0.0, **settings).eval()
    frames = []
    for line in manifest.read_text().split("\n"):
        if line:
            item = json.loads(line)
            path = os.path.join(manifest.parent, item["audio_filepath"])
            audio = AudioSegment.from_file(path, 16000, offset=item.get("offset", 0), duration=item["duration"])
            signal = torch.from_numpy(audio.samples)[None].float()
            features, lengths = module(input_signal=signal, length=torch.tensor([signal.shape[1]]))
            frames.append(features[0, :, : lengths[0]].double().numpy())
    frames = np.concatenate(frames, axis=1)
    return frames.mean(axis=1), frames.std(axis=1, ddof=1), frames.shape[1]


class TestStatistics:
    @pytest.mark.parametrize("workers, batch", [(0, 8), (1, 1), (3, 2)])
    def test_equals_two_passes_for_any_number_of_workers(self, stats, manifest, tmp_path, workers, batch):
        output = tmp_path / "stats.yaml"
        arguments = ["--manifest", str(manifest), "--output", str(output)]
        assert stats.main([*arguments, "--workers", str(workers), "--batch", str(batch)]) == 0
        assert stats.main(["--manifest", str(manifest), "--output", str(tmp_path / "one.yaml")]) == 0
        assert output.read_text() == (tmp_path / "one.yaml").read_text()  # to the last digit

        found, (mean, std, frames) = load_fixed_statistics(output), two_pass(manifest)
        np.testing.assert_allclose(found["fixed_mean"], mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["fixed_std"], std, rtol=0, atol=1e-6)
        assert f"8 utterances, {(1.3 + 6.27) / 3600:.4f} h, {frames} frames" in output.read_text()
        assert sorted(os.listdir(tmp_path)) == ["one.yaml", "stats.yaml"]

    def test_preprocessor_of_a_config(self, stats, manifest, tmp_path):
        config, output = tmp_path / "config.yaml", tmp_path / "stats.yaml"
        config.write_text(
            "model:\n  sample_rate: 16000\n  train_ds: {manifest_filepath: '???'}\n  preprocessor:\n"
            "    _target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor\n"
            "    sample_rate: ${model.sample_rate}\n    normalize: ???\n    features: 24\n    n_fft: 512\n"
            "    window_size: 0.032\n    window_stride: 0.016\n    dither: 1.0\n    pad_to: 16\n"
        )
        options = ["--manifest", str(manifest), str(manifest), "--output", str(output), "--config", str(config)]
        assert stats.main(options) == 0
        mean, std, frames = two_pass(manifest, features=24, window_size=0.032, window_stride=0.016)
        found = load_fixed_statistics(output)
        np.testing.assert_allclose(found["fixed_mean"], mean, rtol=0, atol=1e-6)  # twice the same: the same mean
        variance = std**2 * (frames - 1) * 2 / (2 * frames - 1)
        np.testing.assert_allclose(found["fixed_std"], np.sqrt(variance), rtol=0, atol=1e-6)

    def test_features_normalised_by_them_are_standard(self, stats, manifest, tmp_path):
        output = tmp_path / "stats.yaml"
        assert stats.main(["--manifest", str(manifest), "--output", str(output)]) == 0
        statistics = load_fixed_statistics(output)
        normalised = AudioToMelSpectrogramPreprocessor(
            normalize=statistics, features=80, n_fft=512, window_size=0.025, pad_to=0, dither=0.0
        ).eval()
        dataset = GroupStatistics(utterances_of([str(manifest)]), stats.DEFAULT_PREPROCESSOR)
        dataset.preprocessor = normalised
        total = Moments()
        for moments in dataset[0][0]:
            total = total.merged(moments)
        np.testing.assert_allclose(total.mean, 0, atol=1e-5)
        np.testing.assert_allclose(np.sqrt(total.squares / (total.count - 1)), 1, atol=1e-5)

    @given(
        lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
        offset=st.sampled_from([0.0, -11.0, 1e4]),
        seed=st.integers(0, 99),
    )
    def test_merging_is_exact(self, stats, lengths, offset, seed):
        rng = np.random.default_rng(seed)
        pieces = [rng.standard_normal((3, length)) + offset for length in lengths]
        total = Moments()
        for piece in pieces:
            total = total.merged(Moments.of(piece))
        together = np.concatenate(pieces, axis=1)
        assert total.count == together.shape[1]
        if total.count > 1:
            found = total.statistics()
            np.testing.assert_allclose(found["fixed_mean"], together.mean(axis=1), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(found["fixed_std"], together.std(axis=1, ddof=1), rtol=1e-9)


def frames_by_utterance(stats, manifest):
    """The features [D, T] of each utterance of a manifest, float64."""
    group = GroupStatistics(utterances_of([str(manifest)]), stats.DEFAULT_PREPROCESSOR)
    return [group.features(group.samples(utterance)).astype(np.float64) for utterance in group.utterances]


def targets_by_hand(utterances, combine, normalize):
    """The targets [S, V] of utterances [D, T], frame after frame."""
    mean, std = (np.concatenate(utterances, axis=1) for _ in range(2))
    mean, std = mean.mean(axis=1, keepdims=True), std.std(axis=1, ddof=1, keepdims=True)
    targets = []
    for features in utterances:
        if normalize == "per_feature" and features.shape[1] > 1:
            mean, std = features.mean(axis=1, keepdims=True), features.std(axis=1, ddof=1, keepdims=True) + 1e-5
        features = (features - mean) / std
        for first in range(0, features.shape[1] - combine + 1, combine):
            targets.append(np.concatenate([features[:, first + frame] for frame in range(combine)]))
    return np.array(targets)


def test_channels_are_mixed_down(stats, tmp_path):
    samples = np.random.default_rng(0).standard_normal((16000, 2)) * 0.1
    for name, content in (("two", samples), ("one", samples.mean(axis=1))):
        soundfile.write(tmp_path / f"{name}.wav", content, 16000, subtype="FLOAT")
        manifest = write(tmp_path, {"audio_filepath": f"{name}.wav", "duration": 1.0})
        assert stats.main(["--manifest", str(manifest), "--output", str(tmp_path / f"{name}.yaml")]) == 0
    one, two = (load_fixed_statistics(tmp_path / f"{name}.yaml")["fixed_mean"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-5)


class TestPrincipalComponents:
    def run(self, stats, manifest, folder, *options):
        """Run the script; return the arrays that it wrote."""
        output, pca = folder / "stats.yaml", folder / "pca.npz"
        arguments = ["--manifest", str(manifest), "--output", str(output), "--pca", str(pca), *options]
        assert stats.main(arguments) == 0
        with np.load(pca) as file:
            return dict(file)

    @pytest.mark.parametrize("combine, components", [(2, 64), (4, 5)])
    @pytest.mark.parametrize("normalize", ["per_feature", "NA"])
    def test_equals_the_eigenvectors_of_all_targets_at_once(
        self, stats, manifest, tmp_path, monkeypatch, normalize, combine, components
    ):
        monkeypatch.setattr(corpus_statistics, "UTTERANCES_AT_ONCE", 3)  # so that something is merged
        options = [
            "--target_normalize",
            normalize,
            "--combine_time_steps",
            str(combine),
            "--components",
            str(components),
        ]
        found = self.run(stats, manifest, tmp_path, *options)
        targets = targets_by_hand(frames_by_utterance(stats, manifest), combine, normalize)
        covariance = np.cov(targets.T)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1][:components], vectors.T[::-1][:components]
        np.testing.assert_allclose(found["eigenvalues"], values, rtol=1e-5)
        np.testing.assert_allclose(found["variance_share"], values / np.trace(covariance), rtol=1e-5)
        leading = slice(0, 5)  # further down eigenvalues are near each other, and eigenvectors ill-defined
        likeness = np.abs((found["components"][leading] * vectors[leading]).sum(axis=1))
        np.testing.assert_allclose(likeness, 1, atol=1e-5)
        np.testing.assert_allclose(found["components"] @ found["components"].T, np.eye(components), atol=1e-9)
        assert (found["components"].max(axis=1) == np.abs(found["components"]).max(axis=1)).all()
        settings = [found[name].item() for name in ("combine_time_steps", "features", "normalization", "count")]
        assert settings == [combine, 80, normalize, len(targets)]

    @pytest.mark.parametrize("normalize", ["per_feature", "NA"])
    def test_neither_workers_nor_batches_change_a_digit(self, stats, manifest, tmp_path, monkeypatch, normalize):
        monkeypatch.setattr(corpus_statistics, "UTTERANCES_AT_ONCE", 3)
        written = []
        for workers, batch in ((0, 8), (2, 1), (2, 6)):
            options = ["--target_normalize", normalize, "--workers", str(workers), "--batch", str(batch)]
            self.run(stats, manifest, tmp_path, "--combine_time_steps", "2", *options)
            written.append([(tmp_path / name).read_bytes() for name in ("stats.yaml", "pca.npz")])
        assert written[0] == written[1] == written[2]
        assert stats.main(["--manifest", str(manifest), "--output", str(tmp_path / "alone.yaml")]) == 0
        assert (tmp_path / "alone.yaml").read_bytes() == written[0][0]

    def test_what_the_quantizer_then_sees_has_unit_variance(self, stats, manifest, tmp_path):
        self.run(stats, manifest, tmp_path, "--combine_time_steps", "2")
        quantizer = RandomProjectionVectorQuantizer(
            80, 16, 32, 2, "l2", combine_time_steps=2, projection="pca", projection_file=str(tmp_path / "pca.npz")
        )
        seen = []
        for features in frames_by_utterance(stats, manifest):
            features = torch.from_numpy(features)[None].float()
            features = standardize_per_feature(features, torch.tensor([features.shape[2]]))
            with mock.patch.object(torch.nn.functional, "normalize", lambda values, dim: values):
                seen.append(quantizer._unit_vectors(features).flatten(0, 1).flatten(1))
        np.testing.assert_allclose(np.cov(torch.cat(seen).double().T.numpy()), np.eye(32), atol=1e-2)

    def test_the_config_says_what_the_quantizer_sees_and_the_command_line_wins(self, stats, manifest, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text(
            "model:\n  target_normalize: NA\n  preprocessor:\n"
            "    _target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor\n    features: 12\n"
            "  encoder: {subsampling_factor: 4}\n"
            "  quantizer: {combine_time_steps: '${model.encoder.subsampling_factor}'}\n"
        )
        found = self.run(stats, manifest, tmp_path, "--config", str(config), "--components", "3")
        assert (found["combine_time_steps"], found["normalization"], found["components"].shape) == (4, "NA", (3, 48))
        options = ["--combine_time_steps", "2", "--target_normalize", "per_feature", "--components", "3"]
        found = self.run(stats, manifest, tmp_path, "--config", str(config), *options)
        assert (found["combine_time_steps"], found["normalization"]) == (2, "per_feature")
        assert stats.read_target_settings(None) == ("per_feature", 8)
        config.write_text("model: {target_normalize: null, quantizer: {combine_time_steps: '???'}}\n")
        assert stats.read_target_settings(str(config)) == ("NA", 8)

    def test_it_says_how_to_use_the_file_and_what_was_too_short(self, stats, manifest, tmp_path, capsys):
        self.run(stats, manifest, tmp_path, "--components", "4")
        said = capsys.readouterr().out
        pca = tmp_path / "pca.npz"
        assert f"model.quantizer.projection=pca model.quantizer.projection_file={pca}" in said
        assert "4 principal components with " in said and "target_normalize per_feature" in said
        assert "Utterances shorter than one target (8 frames), which add nothing: 1." in said
        self.run(stats, manifest, tmp_path, "--components", "4", "--combine_time_steps", "1")
        assert "shorter" not in capsys.readouterr().out


def write(folder, *lines):
    path = folder / "manifest.json"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class TestErrors:
    """Each ends in one line that names the culprit, status 1, and no output file."""

    def fails(self, stats, capsys, folder, *options, manifest=None):
        output = folder / "out" / "stats.yaml"
        output.parent.mkdir()
        status = stats.main(
            ["--manifest", str(manifest or folder / "manifest.json"), "--output", str(output), *options]
        )
        assert status == 2
        assert list(output.parent.iterdir()) == []
        return next(line for line in capsys.readouterr().err.splitlines() if "error:" in line)

    def test_missing_manifest(self, stats, capsys, tmp_path):
        assert "manifest.json cannot be read" in self.fails(stats, capsys, tmp_path)

    def test_empty_manifest(self, stats, capsys, tmp_path):
        write(tmp_path, "", "  ")
        assert "manifest.json has no entries" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.parametrize("line", ["not json", "[1]", '{"text": ""}', '{"audio_filepath": 3}'])
    def test_bad_line(self, stats, capsys, tmp_path, line):
        write(tmp_path, "", line)
        assert "line 2 is no " in self.fails(stats, capsys, tmp_path)

    def test_missing_audio(self, stats, capsys, tmp_path):
        write(tmp_path, {"audio_filepath": "gone.wav", "duration": 1.0})
        assert "line 1: there is no audio file gone.wav" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_unreadable_audio(self, stats, capsys, tmp_path, workers):
        (tmp_path / "broken.wav").write_text("no audio")
        write(tmp_path, {"audio_filepath": "broken.wav", "duration": 1.0})
        message = self.fails(stats, capsys, tmp_path, "--workers", workers)
        assert "broken.wav cannot be read" in message

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--components", "13"], "--components 13 needs 14 targets or more; the audio has "),
            (["--combine_time_steps", "1", "--components", "81"], "--components is 81; a target has 80 values"),
            (["--combine_time_steps", "0"], "--combine_time_steps is 0; it must be 1 or more"),
        ],
    )
    def test_components_that_there_are_not(self, stats, capsys, tmp_path, options, message):
        soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
        write(tmp_path, {"audio_filepath": "noise.wav", "duration": 1.0})
        assert message in self.fails(stats, capsys, tmp_path, "--pca", str(tmp_path / "out/pca.npz"), *options)

    def test_unreadable_audio_among_the_targets(self, stats, capsys, tmp_path):
        (tmp_path / "broken.wav").write_text("no audio")
        write(tmp_path, {"audio_filepath": "broken.wav", "duration": 1.0})
        assert "broken.wav cannot be read" in self.fails(
            stats, capsys, tmp_path, "--pca", str(tmp_path / "out/pca.npz")
        )

    @pytest.mark.parametrize(
        "options", [["--components", "3"], ["--combine_time_steps", "8"], ["--target_normalize", "NA"]]
    )
    def test_options_of_the_components_without_them(self, stats, capsys, options):
        with pytest.raises(SystemExit):
            stats.main(["--manifest", "a", "--output", "b", *options])
        assert f"{options[0]} is of use only with --pca" in capsys.readouterr().err

    def test_silence_cannot_be_standardised(self, stats, capsys, tmp_path):
        soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
        write(tmp_path, {"audio_filepath": "silence.wav", "duration": 1.0})
        assert "fixed_std[0] is 0.0" in self.fails(stats, capsys, tmp_path)

    def test_too_little_audio(self, stats, capsys, tmp_path):
        soundfile.write(tmp_path / "short.wav", np.zeros(20), 16000)
        write(tmp_path, {"audio_filepath": "short.wav", "duration": 1.0})
        assert "the audio has 0 feature frames" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.parametrize(
        "config, message",
        [
            (None, "config.yaml"),
            ("model: {}\n", "has no model.preprocessor"),
            ("model: {preprocessor: {sample_rate: '???'}}\n", "sample_rate"),
            ("model: {preprocessor: {features: many}}\n", "cannot make the preprocessor"),
        ],
    )
    def test_config(self, stats, capsys, manifest, tmp_path, config, message):
        path = tmp_path / "config.yaml"
        if config is not None:
            path.write_text(config)
        assert message in self.fails(stats, capsys, tmp_path, "--config", str(path), manifest=manifest)

    def test_output_folder_and_options(self, stats, capsys, manifest, tmp_path):
        output = tmp_path / "none" / "stats.yaml"
        for more in ([], ["--pca", str(output)]):
            with pytest.raises(SystemExit) as end:
                stats.main(
                    ["--manifest", str(manifest), "--output", str(output if not more else tmp_path / "a"), *more]
                )
            assert end.value.code == 2 and "there is no folder" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            stats.main(["--manifest", str(manifest), "--output", str(output), "--workers", "-1"])


@pytest.mark.integration
def test_command_line(stats, manifest, tmp_path):
    output = tmp_path / "stats.yaml"
    result = run_python(stats.__file__, "--manifest", manifest, "--output", output, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert f"model.preprocessor.normalize={output}" in result.stdout
    assert "100%" in result.stderr
    assert len(load_fixed_statistics(output)["fixed_mean"]) == 80
