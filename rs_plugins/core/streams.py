"""Private random streams: one generator per (seed, purpose, key), never the global one.

torch's CPU generator (MT19937) looks at 32 bits of its seed only, so hashing (seed, index) would give two of ten
thousand images the same noise once in a hundred runs. Within one seed and purpose the map key -> seed is therefore a
bijection on the CPU, and 2-to-1 on 2**63 values elsewhere: different images, or different steps, do not share a stream.
"""

import hashlib
import secrets

import torch

from rs_plugins.core.checks import MOST_INDICES
from rs_plugins.errors import InputError


def fresh_seed() -> int:
    """Return 63 bits of entropy from the operating system, to use where the caller gave no seed."""
    return secrets.randbits(63)


def stream(seed: int, purpose: str, key: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of one private stream.

    Args:
        seed: The run's seed.
        purpose: What the draws are for; different purposes give unrelated streams.
        key: Image index or step number, in [0, 2**32).
        device: Where the draws will be made. CPU and GPU streams differ.

    Raises:
        InputError: If ``key`` is outside [0, 2**32).
    """
    if not 0 <= key < MOST_INDICES:
        raise InputError(f"key: expected an integer in [0, 2**32), got {key}")
    offset = int.from_bytes(hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest(), "big")
    device = torch.device(device)
    mixed = _mix32(offset + key) if device.type == "cpu" else _mix64(offset + key)
    return torch.Generator(device).manual_seed(mixed)


def _mix32(value: int) -> int:
    """Return MurmurHash3's finaliser of the low 32 bits: a bijection that scatters neighbouring keys."""
    value &= 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)


def _mix64(value: int) -> int:
    """Return SplitMix64's finaliser of the low 64 bits, below 2**63 because torch's seeds are signed."""
    mask = 0xFFFFFFFFFFFFFFFF
    value &= mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return (value ^ (value >> 31)) >> 1
