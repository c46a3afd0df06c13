"""QLoRA's quantised base (arXiv 2305.14314): the frozen linear maps of a decoder in 4 or 8 bits, by bitsandbytes."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from crocodil.weightless import is_weightless

Quantization = Literal["nf4", "int8"]


def quantize_linears(decoder: nn.Module, quantization: str, compute_dtype: torch.dtype) -> None:
    """Replaces the linear maps inside a decoder's blocks, in place, by empty quantised ones; the head stays as it is.

    Args:
        decoder: a network on the meta device, to be filled afterwards.
        quantization: "nf4" (4 bits, doubly quantised statistics) or "int8".
        compute_dtype: in which nf4 weights are multiplied.

    Raises:
        ValueError: if the scheme is unknown.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"quantization must be one of {', '.join(get_args(Quantization))}, got {quantization!r}")
    import bitsandbytes as bnb  # a slow import, and only quantised networks need it

    for name, linear in list(decoder.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        options = {"bias": linear.bias is not None, "device": "meta"}
        if is_weightless():
            quantized: nn.Module = QuantizedOutline(linear, quantization, compute_dtype)
        elif quantization == "nf4":
            quantized = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=compute_dtype, quant_type="nf4", **options
            )
        else:
            quantized = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0, **options
            )
        quantized.requires_grad_(False)
        quantized.quantized_shape = tuple(linear.weight.shape)  # type: ignore[assignment]
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, quantized)


def quantized_parameter(module: nn.Module, weight: Tensor) -> nn.Parameter:
    """A weight (out, in) as the quantised parameter of one of the layers of `quantize_linears`, on the CPU."""
    import bitsandbytes as bnb

    if isinstance(module, QuantizedOutline):
        return module.get_parameter("weight")
    parameter: Any
    if isinstance(module, bnb.nn.Linear4bit):
        parameter = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
        )
    else:
        parameter = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return parameter.to("cpu")  # packs it


class QuantizedOutline(nn.Linear):
    """Stands for a quantised layer where there are no weights: as much memory, and the same products.

    Packed bytes are unpacked as a whole for each product, which is what bitsandbytes does in training.

    Args:
        linear: the layer to quantise.
        quantization: "nf4" or "int8".
        compute_dtype: in which nf4 weights are multiplied; int8 multiplies in the dtype of its input.
    """

    def __init__(self, linear: nn.Linear, quantization: str, compute_dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.keeps_input = quantization == "int8"
        self.compute_dtype = compute_dtype if quantization == "nf4" else None
        weights, rows = linear.weight.numel(), linear.out_features
        # nf4: half a byte a weight, a byte for 64 of them, a float32 for 256 of those; int8: a float32 for a row
        size = weights // 2 + weights // 64 + weights // 64 // 256 * 4 if quantization == "nf4" else weights + 4 * rows
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="cpu"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), without meaning."""
        x = input.to(self.compute_dtype or input.dtype)
        shape = (self.out_features, self.in_features)
        product = _UnpackedProduct.apply(x, self.weight, shape, self.keeps_input).to(input.dtype)
        return product if self.bias is None else product + self.bias


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int], keeps_input: bool
    ) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(x if keeps_input else None)
        return x @ packed.new_empty(shape, dtype=x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad @ grad.new_empty(ctx.shape), None, None, None
