"""What devices can do at most: dense matrix products, in floating-point operations a second.

From the vendors' data sheets, which docs/callbacks/throughput.md names. Where a sheet gives the figure with structured
sparsity, half of it stands here; for GeForce that with accumulation in float32, which training uses.
"""

import re

import torch

# 10^12 operations a second in float64, float32, TF32, float16, bfloat16; None where the device has no such units.
_Row = tuple[float | None, float | None, float | None, float | None, float | None]
_KINDS = ("float64", "float32", "tf32", "float16", "bfloat16")
_TERA: dict[str, _Row] = {
    r"\bb200\b": (37, 75, 1125, 2250, 2250),
    r"\bh[12]00 nvl\b": (60, 60, 417.5, 835.5, 835.5),
    r"\bg?h200\b": (67, 67, 494.5, 989.5, 989.5),
    r"\bh100 pcie\b|\bh100\b.*\bhbm2e\b": (51, 51, 378, 756, 756),
    r"\bh100\b.*\b(hbm3|sxm5?)\b": (67, 67, 494.7, 989.4, 989.4),
    r"\ba100\b": (19.5, 19.5, 156, 312, 312),
    r"\ba30\b": (10.3, 10.3, 82, 165, 165),
    r"\ba40\b": (None, 37.4, 74.8, 149.7, 149.7),
    r"\ba10\b": (None, 31.2, 62.5, 125, 125),
    r"\brtx a6000\b": (None, 38.7, 77.4, 154.8, 154.8),
    r"\bl40s\b": (None, 91.6, 183, 362, 362),
    r"\bl40\b": (None, 90.5, 90.5, 181, 181),
    r"\bl4\b": (None, 30.3, 60, 121, 121),
    r"\bt4\b": (None, 8.1, None, 65, None),
    r"\bv100-sxm2\b": (7.8, 15.7, None, 125, None),
    r"\bv100-pcie\b": (7, 14, None, 112, None),
    r"\bv100s-pcie\b": (8.2, 16.4, None, 130, None),
    r"\brtx 4090$": (None, 82.6, 82.6, 165.2, 165.2),
    r"\brtx 3090$": (None, 35.6, 35.6, 71, 71),
    r"\bmi300x\b": (163.4, 163.4, 653.7, 1307.4, 1307.4),
}
# A part of a device, and slower devices of the same name.
_OTHERS = re.compile(r"\bmig\b|laptop|max-q")


def dense_peak(device_name: str, kind: str | None) -> float | None:
    """The dense peak of a device in operations a second; None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        kind: float64, float32, tf32, float16 or bfloat16; see `matmul_kind`.
    """
    name = device_name.lower().strip()
    row = next((row for pattern, row in _TERA.items() if re.search(pattern, name)), None)
    if row is None or kind not in _KINDS or _OTHERS.search(name):
        return None
    tera = row[_KINDS.index(kind)]
    if tera is None and kind == "tf32":  # what is allowed to use TF32 and has none uses float32
        tera = row[_KINDS.index("float32")]
    return None if tera is None else tera * 1e12


def matmul_kind(precision: str) -> str | None:
    """In which numbers a Trainer's `precision` multiplies matrices; None for those that the table does not know."""
    if precision == "32-true":
        return "tf32" if _allows_tf32() else "float32"
    return {
        "64-true": "float64",
        "16-mixed": "float16",
        "16-true": "float16",
        "bf16-mixed": "bfloat16",
        "bf16-true": "bfloat16",
    }.get(precision)


def _allows_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set by torch's newer way, which refuses to mix with this one
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
