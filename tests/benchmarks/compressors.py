"""What general compressors make of the held-out standard library, in bits a byte: `python -m tests.benchmarks.compressors`.

The text that `task=lm` validates on, as one piece; xz also after the training part, which it has then learnt as the
model has: compressed together, less the training part alone.
"""

import bz2
import lzma
import tempfile
import zlib
from collections.abc import Callable

from trainerkit.data import StdlibText


def xz(text: bytes) -> bytes:
    # A window that holds the training part too.
    return lzma.compress(
        text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**25}]
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        data = StdlibText(tokenizer="bytes", vocab_size=None, cache_dir=cache)
        train, held_out = ("".join(data.texts(split)).encode() for split in ("train", "val"))
    print(f"{len(train):,} bytes train, {len(held_out):,} are held out")
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "zlib": lambda t: zlib.compress(t, 9),
        "bz2": bz2.compress,
        "xz": xz,
    }
    for name, compress in compressors.items():
        print(f"  {name:<20} {8 * len(compress(held_out)) / len(held_out):.3f} bits a byte")
    primed = len(xz(train + held_out)) - len(xz(train))
    print(f"  {'xz, primed':<20} {8 * primed / len(held_out):.3f} bits a byte")


if __name__ == "__main__":
    main()
