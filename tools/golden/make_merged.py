"""crates/lora-io/tests/golden/merged/*.safetensors: one layer per file with an adapter of PEFT's and what PEFT merges it to.

Kinds that are read and merged here and not trained: `lora_bias`, trained biases, HRA. A file holds `weight` and `bias` of
the layer, `file.KEY` as PEFT saves the adapter, `effective` and `effective_bias` as its `merge_and_unload` leaves them, and
`adapter_config.json` as the metadata `options`. Values come from a generator seeded with the case's name.
"""

import copy
import json
import tempfile
import zlib
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "merged"


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def case(name, layer, config):
    torch.manual_seed(zlib.crc32(name.encode()))
    layer = layer()
    tensors = {key: value.detach().clone() for key, value in layer.state_dict().items()}
    config.target_modules = ["layer"]
    model = peft.get_peft_model(Holder(layer), config)
    for _, value in sorted(model.named_parameters()):
        if value.requires_grad:
            value.data.copy_(0.3 * torch.randn(value.shape))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = json.loads((Path(folder) / "adapter_config.json").read_text())
        for key, value in load_file(Path(folder) / "adapter_model.safetensors").items():
            tensors[f"file.{key}"] = value
    merged = copy.deepcopy(model).merge_and_unload().layer
    tensors |= {"effective": merged.weight.data, "effective_bias": merged.bias.data}
    metadata = {"peer": f"peft {peft.__version__}", "options": json.dumps(options, sort_keys=True)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, FOLDER / f"{name}.safetensors", metadata)


def main():
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    linear, conv = lambda: nn.Linear(12, 20), lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1)
    lora = lambda **given: peft.LoraConfig(r=4, lora_alpha=6, **given)  # noqa: E731
    case("lora-bias-linear", linear, lora(lora_bias=True))
    case("lora-bias-conv3x3", conv, lora(lora_bias=True, use_rslora=True))
    case("bias-lora-only-linear", linear, lora(bias="lora_only"))
    case("hra-linear", linear, peft.HRAConfig(r=4))
    case("hra-odd-linear", linear, peft.HRAConfig(r=3))
    case("hra-orthogonal-linear", linear, peft.HRAConfig(r=4, apply_GS=True))
    case("hra-conv3x3", conv, peft.HRAConfig(r=4))


if __name__ == "__main__":
    main()
