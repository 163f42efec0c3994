# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import json
import os

import numpy as np
import pytest
import soundfile
import torch
from fresh_process import run_python
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import load_fixed_statistics
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
    @pytest.mark.unit
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

    @pytest.mark.unit
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

    @pytest.mark.unit
    def test_features_normalised_by_them_are_standard(self, stats, manifest, tmp_path):
        output = tmp_path / "stats.yaml"
        assert stats.main(["--manifest", str(manifest), "--output", str(output)]) == 0
        statistics = load_fixed_statistics(output)
        normalised = AudioToMelSpectrogramPreprocessor(
            normalize=statistics, features=80, n_fft=512, window_size=0.025, pad_to=0, dither=0.0
        ).eval()
        dataset = stats.UtteranceMoments(stats.read_manifests([str(manifest)]), stats.DEFAULT_PREPROCESSOR)
        dataset.preprocessor = normalised
        total = stats.Moments()
        for index in range(len(dataset)):
            total = total.merged(dataset[index])
        np.testing.assert_allclose(total.mean, 0, atol=1e-5)
        np.testing.assert_allclose(np.sqrt(total.squares / (total.count - 1)), 1, atol=1e-5)

    @pytest.mark.unit
    @given(
        lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
        offset=st.sampled_from([0.0, -11.0, 1e4]),
        seed=st.integers(0, 99),
    )
    def test_merging_is_exact(self, stats, lengths, offset, seed):
        rng = np.random.default_rng(seed)
        pieces = [rng.standard_normal((3, length)) + offset for length in lengths]
        total = stats.Moments()
        for piece in pieces:
            total = total.merged(stats.Moments.of(piece))
        together = np.concatenate(pieces, axis=1)
        assert total.count == together.shape[1]
        if total.count > 1:
            found = total.statistics()
            np.testing.assert_allclose(found["fixed_mean"], together.mean(axis=1), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(found["fixed_std"], together.std(axis=1, ddof=1), rtol=1e-9)


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
        assert status == 1
        assert list(output.parent.iterdir()) == []
        return next(line for line in capsys.readouterr().err.splitlines() if "error:" in line)

    @pytest.mark.unit
    def test_missing_manifest(self, stats, capsys, tmp_path):
        assert "manifest.json: there is no such file" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
    def test_empty_manifest(self, stats, capsys, tmp_path):
        write(tmp_path, "", "  ")
        assert "manifest.json has no entries" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
    @pytest.mark.parametrize("line", ["not json", "[1]", '{"text": ""}', '{"audio_filepath": 3}'])
    def test_bad_line(self, stats, capsys, tmp_path, line):
        write(tmp_path, "", line)
        assert "line 2 is no NeMo entry" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
    def test_missing_audio(self, stats, capsys, tmp_path):
        write(tmp_path, {"audio_filepath": "gone.wav", "duration": 1.0})
        assert "line 1: there is no audio file gone.wav" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_unreadable_audio(self, stats, capsys, tmp_path, workers):
        (tmp_path / "broken.wav").write_text("no audio")
        write(tmp_path, {"audio_filepath": "broken.wav", "duration": 1.0})
        message = self.fails(stats, capsys, tmp_path, "--workers", workers)
        assert "broken.wav cannot be read" in message

    @pytest.mark.unit
    def test_two_channels(self, stats, capsys, tmp_path):
        soundfile.write(tmp_path / "stereo.wav", np.zeros((16000, 2)), 16000)
        write(tmp_path, {"audio_filepath": "stereo.wav", "duration": 1.0})
        assert "stereo.wav has 2 channels" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
    def test_silence_cannot_be_standardised(self, stats, capsys, tmp_path):
        soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
        write(tmp_path, {"audio_filepath": "silence.wav", "duration": 1.0})
        assert "fixed_std[0] is 0.0" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
    def test_too_little_audio(self, stats, capsys, tmp_path):
        soundfile.write(tmp_path / "short.wav", np.zeros(20), 16000)
        write(tmp_path, {"audio_filepath": "short.wav", "duration": 1.0})
        assert "the audio has 0 feature frames" in self.fails(stats, capsys, tmp_path)

    @pytest.mark.unit
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

    @pytest.mark.unit
    def test_output_folder_and_options(self, stats, capsys, manifest, tmp_path):
        output = tmp_path / "none" / "stats.yaml"
        assert stats.main(["--manifest", str(manifest), "--output", str(output)]) == 1
        assert "there is no folder" in capsys.readouterr().err
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
