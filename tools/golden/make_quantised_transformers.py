"""crates/lora-io/tests/golden/transformers: transformers in few bits under the original tree's names, as people pass them on.

- flux_quantised.gguf: matrices in Q8_0 and Q4_0, the final layer's modulation in Q5_1, vectors in fp32, one matrix in fp16, one
  laid out anew with its own shape in the header; flux_quantised.safetensors: what gguf reads out of it, under diffusers' names.
- t5.gguf, t5.safetensors: an encoder under llama.cpp's names, and its values under transformers'.
- flux_scaled.safetensors: matrices in 8-bit floats with a scale of the tensor, or of each row, beside them;
  flux_scaled_values.safetensors: their products, under diffusers' names.

Run it with the packages of requirements.txt; the same bytes come out each time.
"""

import gguf
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

import synthetic
from make_transformer_layouts import GOLDEN, flux, led_back, original

WIDTH = 32


def random(name, shape):
    return torch.from_numpy(synthetic.uniform(name, shape))


def save(name, tensors):
    path = GOLDEN / f"{name}.safetensors"
    save_file({key: value.contiguous().clone() for key, value in sorted(tensors.items())}, path)
    path.chmod(0o644)


def kind_of(name, tensor):
    if tensor.dim() != 2 or tensor.shape[1] % 32:
        return Kind.F32
    if name.startswith("final_layer.adaLN"):
        return Kind.Q5_1
    if name.startswith("txt_in"):
        return Kind.F16
    return Kind.Q4_0 if "mlp" in name or "linear2" in name else Kind.Q8_0


def quantised():
    """FLUX.1 of one block of each kind."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=1,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    )
    _, rows, swapped, _ = flux()
    state = {key: random(f"quantised.{key}", tuple(value.shape)) for key, value in model.state_dict().items()}
    writer, values = gguf.GGUFWriter(GOLDEN / "flux_quantised.gguf", "flux"), {}
    for name, tensor in original(state, rows, swapped).items():
        numbers, kind, shape = tensor.numpy(), kind_of(name, tensor), tuple(tensor.shape)
        if name == "img_in.weight":
            # Eight columns are no block: all numbers of four rows are one.
            numbers, kind = numbers.reshape(-1, 32), Kind.Q8_0
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
        data = gguf.quants.quantize(numbers, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32).reshape(shape))
    finish(writer)
    # Feed-forwards and modulations of blocks are large and lie as they are: without them.
    values = led_back("flux", values, WIDTH)
    save("flux_quantised", {name: value for name, value in values.items() if ".ff" not in name and ".norm1" not in name})


def t5():
    config = T5Config(
        vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config.num_layers)
    writer, values = gguf.GGUFWriter(GOLDEN / "t5.gguf", "t5encoder"), {}
    for name, tensor in T5EncoderModel(config).state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        numbers = random(f"t5.{name}", tuple(tensor.shape)).numpy()
        kind = Kind.Q8_0 if numbers.ndim == 2 and numbers.shape[1] % 32 == 0 else Kind.F32
        data = gguf.quants.quantize(numbers, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    finish(writer)
    save("t5", values)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scaled():
    model, rows, swapped, _ = flux()
    state = {key: random(f"scaled.{key}", tuple(value.shape)) for key, value in model.state_dict().items()}
    file, values = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in original(state, rows, swapped).items():
        if tensor.dim() < 2:
            file[name] = values[name] = tensor
            continue
        module, by_row = name.removesuffix(".weight"), "linear1" in name
        largest = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().amax()
        scale = largest / 448
        file[name] = (tensor / scale).to(torch.float8_e4m3fn)
        file[f"{module}.{'weight_scale' if by_row else 'scale_weight'}"] = scale
        if by_row:
            mark = b'{"format": "float8_e4m3fn"}'
            file[f"{module}.comfy_quant"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
        else:
            file[f"{module}.scale_input"] = torch.tensor(2.0)
        values[name] = file[name].float() * scale
    save("flux_scaled", file)
    save("flux_scaled_values", led_back("flux", values, 8))


if __name__ == "__main__":
    quantised()
    t5()
    scaled()
