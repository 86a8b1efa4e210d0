"""What of this processor matters to eight bit products."""

import platform
from pathlib import Path

WIDE = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""Instructions that add products of 8 bits in 32; without them pairs are added in 16 and clip."""


def adds_without_clipping() -> bool:
    """Whether products of unsigned and signed bytes are added exactly here."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(WIDE & set(flags.split()))
