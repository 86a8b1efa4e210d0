"""Randomness by name: every sample of every update has its own stream.

A draw depends on (seed, step, update, sample, name) and on nothing else. So gradient accumulation,
several processes and a resumed run see what one large uninterrupted batch would, without any
generator state to carry, and adding a term to a method leaves the draws of the others alone.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """The randomness of (a part of) one update.

    Attributes:
        seed: Of the run.
        step: Optimizer step of the student.
        update: Which update of this step: the student's is 0, the critic's 1, 2, ...
        samples: Global indices of this part's samples.
        device: Where drawn tensors go.
    """

    seed: int
    step: int
    update: int
    samples: range
    device: torch.device

    def __len__(self) -> int:
        return len(self.samples)

    def split(self, parts: int) -> list["Draws"]:
        """The same draws as `parts` equal batches."""
        size = len(self.samples) // parts
        return [
            Draws(
                self.seed,
                self.step,
                self.update,
                self.samples[i * size : (i + 1) * size],
                self.device,
            )
            for i in range(parts)
        ]

    def shared(self, name: str) -> torch.Generator:
        """A generator that is the same for all samples, parts and processes of this update."""
        digest = hashlib.blake2b(self._key(name), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """One integer in [low, high), the same for all samples, parts and processes."""
        return int(torch.randint(low, high, (), generator=self.shared(name)))

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, shape (B, *shape), float32; row i belongs to sample i alone."""
        generator, rows = torch.Generator(), torch.empty((len(self.samples), *shape))
        for row, seed in zip(rows.unbind(), self._seeds(name), strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return rows.to(self.device)

    def uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), shape (B,), float32."""
        values = [(seed >> 39) * 2.0**-24 for seed in self._seeds(name)]  # 24 bits: exact floats
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def integers(self, name: str, high: int) -> Tensor:
        """Integers in [0, high), shape (B,), int64, on the CPU."""
        return torch.tensor([(seed * high) >> 63 for seed in self._seeds(name)])

    def _seeds(self, name: str) -> list[int]:
        """63 bits for every sample."""
        start = hashlib.blake2b(self._key(name), digest_size=8)
        seeds = []
        for sample in self.samples:
            one = start.copy()
            one.update(sample.to_bytes(8, "little"))
            seeds.append(int.from_bytes(one.digest(), "little") >> 1)
        return seeds

    def _key(self, name: str) -> bytes:
        return f"{self.seed}/{self.step}/{self.update}/{name}/".encode()
