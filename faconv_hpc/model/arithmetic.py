"""In which arithmetic a network computes: decided here, from the key ``training.precision``, for all layers alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ACTIVATIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
"""By precision. Cell states, inputs and sums are float32 with all of them."""


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Products of float32 tensors inside, matrix products and convolutions alike, are those of a precision.

    By itself torch makes convolutions on a GPU in TF32 and matrix products in float32, so ConvLSTM and FAConvLSTM would
    not compute alike. On a CPU there is no TF32: ``tf32`` computes as ``fp32`` does.

    Torch's older settings are used: with its newer ones torch.compile ends with an error (pytorch issue 166387).

    Args:
        precision: ``tf32`` rounds what is multiplied to 10 bits of mantissa; ``fp32`` and ``bf16`` round nothing: what
            is in bf16 is another type.
        device: that computes.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    rounds = precision == "tf32" and device.type == "cuda"
    _set("high" if rounds else "highest", rounds)
    try:
        yield
    finally:
        _set(*before)


def rounds_products() -> bool:
    """Whether products of float32 tensors on a GPU are those of ``tf32`` now."""
    return torch.get_float32_matmul_precision() != "highest"


def _set(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
