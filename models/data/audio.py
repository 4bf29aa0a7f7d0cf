"""One-second sounds in twelve classes, made by rule, and the MFCC features that keyword spotting uses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.models.data.samples import Dataset, Floats, Ints, Samples

SAMPLE_RATE = 16_000
FRAME, HOP = 480, 320  # 30 ms every 20 ms: 49 frames a second
NUM_FFT = 512
NUM_MEL, NUM_MFCC = 40, 10
NUM_FRAMES = 1 + (SAMPLE_RATE - FRAME) // HOP

# A class is a register and a contour: where the fundamental starts, and how it moves over the sound.
REGISTERS_HZ = (150.0, 300.0, 600.0)
CONTOURS = ("level", "rising", "falling", "arch")
NUM_CLASSES = len(REGISTERS_HZ) * len(CONTOURS)


def keywords(*, num_train: int = 1200, num_test: int = 300, seed: int = 0) -> Dataset[Floats]:
    """Twelve "keywords": harmonic sounds in three registers with four pitch contours, under noise.

    Onset, length, pitch (a tenth of a register), number of harmonics, loudness and noise vary.

    Returns:
        Inputs float32 [N, 1, 49, 10], MFCC of mean 0 and deviation 1 per coefficient over the training set;
        targets int64 [N].
    """
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, NUM_CLASSES, count) for count in (num_train, num_test)]
    train, test = (mfcc(sounds(part, rng)) for part in labels)
    mean, deviation = train.mean((0, 1)), train.std((0, 1))
    return Dataset(*(Samples(((x - mean) / deviation)[:, None], y) for x, y in zip((train, test), labels, strict=True)))


def sounds(labels: Ints, rng: np.random.Generator) -> Floats:
    """One second of sound for each class in `labels`: float32 [N, 16000], within about ±1."""
    waves = np.empty((len(labels), SAMPLE_RATE), dtype=np.float32)
    for row, label in enumerate(labels):
        register, contour = divmod(int(label), len(CONTOURS))
        waves[row] = _sound(REGISTERS_HZ[register], CONTOURS[contour], rng)
    return waves


def _sound(register_hz: float, contour: str, rng: np.random.Generator) -> Floats:
    onset, length = rng.uniform(0.05, 0.3), rng.uniform(0.45, 0.65)
    progress = (np.arange(SAMPLE_RATE) / SAMPLE_RATE - onset) / length  # 0…1 while it sounds
    during = np.clip(progress, 0, 1)
    octaves = {
        "level": np.zeros_like(during),
        "rising": 0.8 * during - 0.4,
        "falling": 0.4 - 0.8 * during,
        "arch": 0.8 * np.sin(np.pi * during) - 0.4,
    }[contour]
    hertz = register_hz * rng.uniform(0.9, 1.1) * 2.0**octaves
    phase = 2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE
    tone = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, int(rng.integers(4, 8))))
    envelope = np.where((progress > 0) & (progress < 1), np.sin(np.pi * during) ** 0.5, 0.0)
    noise = rng.uniform(0.005, 0.05) * rng.standard_normal(SAMPLE_RATE)
    return (rng.uniform(0.2, 0.6) * tone * envelope + noise).astype(np.float32)


def mfcc(waves: Floats) -> Floats:
    """Mel-frequency cepstral coefficients (Davis and Mermelstein 1980).

    Hann window of 30 ms every 20 ms, power spectrum, 40 triangular mel bands from 20 Hz to 4 kHz, logarithm,
    type-II DCT of which the first ten coefficients are kept: the 49x10 input of MLPerf Tiny's keyword
    spotting.

    Args:
        waves: float32 [N, 16000], 16 kHz.

    Returns:
        float32 [N, 49, 10].
    """
    window = np.hanning(FRAME).astype(np.float32)
    bands, cosines = _mel_bands(), _cosines()
    features = np.empty((len(waves), NUM_FRAMES, NUM_MFCC), dtype=np.float32)
    for row, wave in enumerate(waves):
        frames = np.lib.stride_tricks.sliding_window_view(wave, FRAME)[::HOP] * window
        power = np.abs(np.fft.rfft(frames, NUM_FFT)) ** 2
        features[row] = np.log(power @ bands + 1e-6) @ cosines
    return features


def _mel_bands() -> Floats:
    """Triangles [NUM_FFT // 2 + 1, NUM_MEL], evenly spaced in mel."""
    edges_mel = np.linspace(_mel(20.0), _mel(4000.0), NUM_MEL + 2)
    low, middle, high = edges_mel[:-2], edges_mel[1:-1], edges_mel[2:]
    mel = _mel(np.arange(NUM_FFT // 2 + 1) * SAMPLE_RATE / NUM_FFT)[:, None]
    return np.maximum(0, np.minimum((mel - low) / (middle - low), (high - mel) / (high - middle))).astype(np.float32)


def _mel(hertz: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(2595 * np.log10(1 + np.asarray(hertz) / 700))


def _cosines() -> Floats:
    """The orthonormal type-II DCT, its first columns: [NUM_MEL, NUM_MFCC]."""
    order, band = np.arange(NUM_MFCC), np.arange(NUM_MEL)[:, None]
    matrix = np.sqrt(2 / NUM_MEL) * np.cos(np.pi * order * (2 * band + 1) / (2 * NUM_MEL))
    matrix[:, 0] /= np.sqrt(2)
    return np.asarray(matrix, dtype=np.float32)
