"""Speech: the same sentences in several voices, by espeak-ng, or hummed by simple ones where it is not installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import wave
from pathlib import Path

import torch
from torch import Tensor

RATE, WINDOW, HOP, MELS, FRAMES = 16_000, 400, 160, 40, 160
"""Samples a second, of a window and between windows; mel bands; frames of an utterance: 1.6 seconds."""
ESPEAK = ("m1", "m3", "m5", "m7", "f1", "f2", "f4", "f5")
HUMMED = {f"{pitch} Hz, tract {tract}": (pitch, tract) for pitch in (95, 130, 180, 240) for tract in (0.9, 1.15)}
"""Fundamental, and the factor on the formants."""
VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""The first three formants of five vowels, in Hz (Peterson & Barney 1952)."""


def voices() -> tuple[str, ...]:
    """The names of the voices that can be had here."""
    return ESPEAK if shutil.which("espeak-ng") else tuple(HUMMED)


def said(voice: str, text: str) -> Tensor:
    """The utterance as the encoder takes it: (160 frames, 40 mel bands)."""
    sound = _hummed(*HUMMED[voice], text) if voice in HUMMED else _spoken(voice, text)
    loud = (sound.abs() > 0.05 * sound.abs().max()).nonzero()[[0, -1], 0]
    sound = sound[loud[0] : loud[1]]
    needed = FRAMES * HOP
    sound = sound.repeat(-(-needed // len(sound)))[:needed]
    return mel(sound / sound.square().mean().sqrt() * 10 ** (-30 / 20))[:FRAMES]


def mel(sound: Tensor) -> Tensor:
    """The power in each of 40 mel bands, (frames, 40): Slaney's scale, triangles of area 1."""
    power = torch.stft(
        sound, WINDOW, HOP, window=torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    return power.abs().square().T @ _bands().T


def _bands() -> Tensor:
    """(40, 201): a triangle for every band, over the frequencies of the spectrum."""
    top = 15 + 27 * torch.log(torch.tensor(RATE / 2 / 1000)) / torch.log(torch.tensor(6.4))
    places = torch.linspace(0, 1, MELS + 2) * top  # linear to 1000 Hz, which is place 15, logarithmic above it
    edges = torch.where(places < 15, places * 200 / 3, 1000 * 6.4 ** ((places - 15) / 27))
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]


def _spoken(voice: str, text: str) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.wav"
        subprocess.run(["espeak-ng", "-v", f"en+{voice}", "-w", str(file), text], check=True)
        with wave.open(str(file)) as opened:
            rate, data = opened.getframerate(), opened.readframes(opened.getnframes())
    sound = torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15
    count = len(sound) * RATE // rate
    resampled: Tensor = torch.fft.irfft(torch.fft.rfft(sound)[: count // 2 + 1], n=count) * (count / len(sound))
    return resampled


def _hummed(pitch: float, tract: float, text: str) -> Tensor:
    """A vowel for every letter: harmonics of the pitch, the louder the nearer to a formant."""
    generator = torch.Generator().manual_seed(sum(map(ord, text)))
    chosen = torch.tensor(VOWELS)[torch.randint(len(VOWELS), (16,), generator=generator)] * tract
    formants = chosen.repeat_interleave(RATE // 8, dim=0)  # (samples, 3)
    wobble = 1 + 0.03 * torch.sin(torch.arange(len(formants)) / RATE * 2 * torch.pi * 3)
    phase = (pitch * wobble / RATE).cumsum(dim=0) * 2 * torch.pi
    sound = torch.zeros(len(formants))
    for harmonic in range(1, int(RATE / 2 / pitch)):
        gain = (1 / (1 + ((harmonic * pitch - formants) / 80).square())).sum(dim=1) / harmonic
        sound += gain * torch.sin(harmonic * phase)
    return sound
