"""crates/lora-io/tests/golden/variants/*.safetensors: one adapted layer per file, as PEFT and LyCORIS compute it.

The peers' own classes are called, never copied. What counts is the weight that was trained, that is what the live forward
applies; where a peer merges something else, the note in the file says so and by how much. What a file contains:
README.md beside them. Every value comes from a generator seeded with the name of the case, and the writer here orders
everything, so the same bytes come out each time (same machine, same packages).

Checked while writing, for each case: the plain layer with `effective` gives `output` to 1e-5, and the gradients are those
of central differences, except where the peer cuts them on purpose (PEFT's DoRA).
"""

import argparse
import copy
import json
import logging
import math
import struct
import tempfile
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import lycoris  # noqa: E402
import peft  # noqa: E402
from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402
from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402
from lycoris.modules.full import FullModule  # noqa: E402
from lycoris.modules.glora import GLoRAModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "variants"
PEFT, LYCORIS = f"peft {peft.__version__}", "lycoris 4.1.3"
PREFIX = "base_model.model.layer."

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "square": lambda: nn.Linear(16, 16),
    "conv3x3": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "conv3x3-wide": lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1),
    "conv1x1": lambda: nn.Conv2d(6, 8, 1),
    "grouped": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
    "embedding": lambda: nn.Embedding(30, 8),
    "layernorm": lambda: nn.LayerNorm(12),
    "groupnorm": lambda: nn.GroupNorm(4, 12),
}
NAMES = {torch.float32: "F32", torch.int64: "I64"}


# Files


def write(name, tensors, metadata):
    """One safetensors file; the library's writer orders several metadata entries arbitrarily, so serialised here."""
    header, blocks, offset = {"__metadata__": dict(sorted(metadata.items()))}, [], 0
    for key, value in sorted(tensors.items()):
        value = value.detach().to("cpu")
        value = (value.float() if value.is_floating_point() else value).contiguous()
        assert value.isfinite().all(), f"{name}: {key}"
        block = value.numpy().tobytes()
        header[key] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(block)],
        }
        offset += len(block)
        blocks.append(block)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    path = FOLDER / f"{name}.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blocks))
    assert path.stat().st_size < 40_000, f"{name}: {path.stat().st_size} bytes"
    load_file(path)
    print(f"{name}: {len(tensors)} tensors, {path.stat().st_size} bytes; {metadata.get('note', '')}")


def text(values):
    return json.dumps(values, sort_keys=True)


# Layers


def generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def normal(shape, draw, deviation=1.0, mean=0.0):
    return torch.randn(shape, generator=draw) * deviation + mean


def base_layer(which, draw):
    """A layer with random values. Its own initialisation is overwritten, so that torch's global state is of no account."""
    layer = LAYERS[which]()
    with torch.no_grad():
        for name, value in layer.named_parameters():
            shift = 1.0 if which.endswith("norm") and name == "weight" else 0.0
            value.copy_(normal(value.shape, draw, 0.5 if name == "bias" else 0.4, shift))
            value.requires_grad_(False)
    return layer


def make_input(layer, draw):
    if isinstance(layer, nn.Linear):
        return normal((3, 5, layer.in_features), draw)
    if isinstance(layer, nn.Conv2d):
        return normal((2, layer.in_channels, 7, 6), draw)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (3, 4), generator=draw)
    if isinstance(layer, nn.LayerNorm):
        return normal((3, 5, 12), draw)
    return normal((2, 12, 3, 4), draw)


def kind(layer):
    return {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.Embedding: "embedding"}.get(type(layer), "norm")


def plain(layer, x, weight, bias):
    """The layer's plain operation with another weight and bias. A convolution weight over all input channels undoes groups."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        groups = layer.in_channels // weight.shape[1]
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=groups)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)


@torch.no_grad()
def applied(layer, live, dtype):
    """Weight and bias that `live` applies, from its answers to unit inputs."""
    if isinstance(layer, nn.Linear):
        bias = live(torch.zeros(1, layer.in_features, dtype=dtype))[0]
        return (live(torch.eye(layer.in_features, dtype=dtype)) - bias).T, bias
    if isinstance(layer, nn.Embedding):
        return live(torch.arange(layer.num_embeddings)), None
    channels, (tall, wide) = layer.in_channels, layer.kernel_size
    step, edge = layer.stride[0], layer.padding[0]
    place = -(-edge // step)  # an output that sees no padding, and where it starts to look
    start = place * step - edge
    units = torch.zeros(channels * tall * wide, channels, start + 3 * tall, start + 3 * wide, dtype=dtype)
    for index in range(len(units)):
        channel, down, right = index // (tall * wide), index // wide % tall, index % wide
        units[index, channel, start + down, start + right] = 1
    bias = live(torch.zeros_like(units[:1]))[0, :, place, place]
    dense = (live(units)[:, :, place, place] - bias).T.reshape(-1, channels, tall, wide)
    if layer.groups > 1:
        narrow = channels // layer.groups
        groups = dense.reshape(layer.groups, -1, layer.groups, narrow, tall, wide)
        outside = groups.clone()
        for group in range(layer.groups):
            outside[group, :, group] = 0
        if outside.abs().max() < 1e-9 or (dtype == torch.float32 and outside.abs().max() < 1e-6):
            dense = torch.cat([groups[group, :, group] for group in range(layer.groups)])
    return dense, bias


# One case


@contextmanager
def wide_everywhere():
    """LyCORIS inverts in float32 whatever the tensors are; for the check by differences it stays in float64."""
    with mock.patch.object(torch.Tensor, "float", lambda self: self):
        yield


def check_gradients(name, live, x, probe, trained, gradients, skipped, wide):
    """Central differences along one random direction per tensor."""
    draw = generator(name + " directions")
    for key, value in trained.items():
        if key in skipped:
            continue
        direction = normal(value.shape, draw).to(value.dtype)
        step = 1e-5 if wide else 2e-3
        kept, sums = value.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                value.copy_(kept + sign * step * direction)
                sums.append((live(x) * probe).sum().double())
            value.copy_(kept)
        expected = ((sums[0] - sums[1]) / (2 * step)).item()
        got = (gradients[key].double() * direction).sum().item()
        size = (gradients[key].double().norm() * direction.double().norm()).item() + 1e-3
        assert abs(expected - got) < (1e-6 if wide else 5e-3) * size, f"{name}: {key}: {got} for {expected}"


def gradients_of(live, x, probe, trained):
    for value in trained.values():
        value.grad = None
    output = live(x)
    (output * probe).sum().backward()
    return output.detach(), {key: value.grad.clone() for key, value in trained.items()}


class Case:
    """What both peers need to give: the layer, a live forward, the trained tensors by their key in the file, the file."""

    skipped = ()  # trained tensors whose gradient the peer cuts on purpose
    sound = None  # a context under which the live forward has true gradients, where the peer's own are wrong
    wide = True  # computes in float64
    weight_change = True

    def __init__(self, name, which, algorithm, options, note):
        self.name, self.which, self.algorithm, self.options, self.note = name, which, algorithm, options, note
        self.draw = generator(name)
        self.layer = base_layer(which, self.draw)
        self.plain = copy.deepcopy(self.layer)

    def make(self):
        notes = [self.note] if self.note else []
        layer, draw = self.plain, self.draw
        x = make_input(layer, draw)
        tensors = {"input": x.float(), "weight": layer.weight.clone()}
        if getattr(layer, "bias", None) is not None:
            tensors["bias"] = layer.bias.clone()
        with torch.no_grad():
            self.live(x)  # PEFT's constrained OFT writes into its tensors
            probe = normal(self.live(x).shape, draw)
        tensors["probe"] = probe
        tensors |= {f"file.{key}": value.clone() for key, value in self.file().items()}

        dtype = torch.float64 if self.wide else torch.float32
        if self.wide:
            self.double()
        x = x.to(dtype) if x.is_floating_point() else x
        probe = probe.to(dtype)
        output, gradients = gradients_of(self.live, x, probe, self.trained())
        if self.sound:
            with self.sound():
                _, true = gradients_of(self.live, x, probe, self.trained())
            for key, value in gradients.items():
                away = (value - true[key]).abs().max().item()
                if away > 1e-9:
                    tensors[f"peer_grad.{key}"] = value
                    notes.append(f"the peer's own gradient of {key} is wrong by up to {away:.3g} (peer_grad)")
            gradients = true
        tensors["output"] = output
        tensors |= {f"grad.{key}": value for key, value in self.reported(gradients).items()}

        if self.weight_change:
            weight, bias = self.effective(dtype)
            tensors["effective"] = weight
            if bias is not None:
                tensors["effective_bias"] = bias
            again = plain(layer.to(dtype), x, weight, bias)
            away = (again - output).abs().max().item()
            assert away < 1e-5, f"{self.name}: effective gives output only to {away}"
        try:
            merged, merged_bias = self.merged()
            if self.weight_change:
                away = (merged - weight).abs().max().item() if merged.shape == weight.shape else math.inf
                if bias is not None and merged_bias is not None:
                    away = max(away, (merged_bias - bias).abs().max().item())
            else:
                tensors["merged"] = merged
                again = plain(layer.to(dtype), x, merged, layer.bias)
                away = (again - output).abs().max().item()
            if away > 1e-5:
                what = "the peer's own merge" if self.weight_change else "the output of the peer's own merge"
                notes.append(f"{what} differs from the live forward by up to {away:.3g}")
            difference = f"{away:.3g}" if away > 1e-5 else "0"
        except (NotImplementedError, RuntimeError, ValueError) as error:
            difference = f"refused: {type(error).__name__}"
            notes.append(f"the peer refuses or fails to merge ({type(error).__name__})")

        self.double()
        with wide_everywhere():
            trained = self.trained()
            x = x.double() if x.is_floating_point() else x
            raw = {key: value.double() for key, value in gradients.items()}
            if not self.wide:
                _, raw = gradients_of(self.live, x, probe.double(), trained)
                for key, value in raw.items():
                    near = (value - gradients[key].double()).abs().max() < 1e-3 * (1 + value.abs().max())
                    assert near, f"{self.name}: {key}: float32 and float64 disagree"
            check_gradients(self.name, self.live, x, probe.double(), trained, raw, self.skipped, True)
        if self.skipped:
            notes.append("gradients as the peer cuts them: the norm under the magnitude counts as constant")

        metadata = {
            "peer": self.peer,
            "kind": kind(self.plain),
            "layer": type(self.plain).__name__,
            "algorithm": self.algorithm,
            "options": text(self.written_options()),
            "computed_in": "float64" if self.wide else "float32",
            "merged_difference": difference,
            "note": "; ".join(notes),
        }
        if isinstance(self.plain, nn.Conv2d):
            metadata |= {
                "stride": str(layer.stride[0]),
                "padding": str(layer.padding[0]),
                "groups": str(layer.groups),
            }
        if isinstance(self.plain, nn.GroupNorm):
            metadata["groups"] = str(layer.num_groups)
        write(self.name, tensors, metadata)

    def effective(self, dtype):
        return applied(self.plain, self.live, dtype)

    def reported(self, gradients):
        return gradients


# PEFT


class Holder(nn.Module):
    def __init__(self, layer, other=None):
        super().__init__()
        self.layer = layer
        if other is not None:
            self.other = other

    def forward(self, x):
        return self.layer(x)


class PeftCase(Case):
    peer = PEFT

    def __init__(self, name, which, algorithm, config, note="", other=None):
        super().__init__(name, which, algorithm, None, note)
        self.sound = true_loha if algorithm == "loha" else None
        targets = ["layer"] if other is None else ["layer", "other"]
        torch.manual_seed(zlib.crc32(name.encode()))  # VeRA's projections and other frozen values
        config.target_modules = targets
        if hasattr(config, "feedforward_modules"):
            config.feedforward_modules = targets if config.feedforward_modules else []
        self.model = peft.get_peft_model(Holder(self.layer, other), config).eval()
        for key, value in sorted(self.model.named_parameters()):
            if value.requires_grad:
                value.data.copy_(self.value(key, value.data))
        if getattr(config, "use_dora", False):
            self.skipped = tuple(key for key in self.trained() if "magnitude" not in key)
        if getattr(config, "coft", False):
            self.skipped = tuple(self.trained())

    def value(self, key, start):
        if "magnitude" in key:
            return start * (1 + normal(start.shape, self.draw, 0.2))
        centre = 1.0 if "ia3_l" in key or "boft_s" in key else 0.0
        return normal(start.shape, self.draw, 0.3, centre)

    def live(self, x):
        return self.model(x)

    def double(self):
        self.model.double()

    def saved(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, save_embedding_layers=False)
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            return load_file(Path(folder) / "adapter_model.safetensors"), config

    def file(self):
        saved, self.config = self.saved()
        return {key.removeprefix(PREFIX): value for key, value in saved.items() if ".other." not in key}

    def written_options(self):
        return self.config

    def trained(self):
        places = {value.data_ptr(): value for value in self.model.parameters() if value.requires_grad}
        state = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {
            key.removeprefix(PREFIX): places[value.data_ptr()]
            for key, value in state.items()
            if value.data_ptr() in places and ".other." not in key
        }

    def merged(self):
        layer = copy.deepcopy(self.model).merge_and_unload().layer
        return layer.weight.data, getattr(layer, "bias", None)


@contextmanager
def true_loha():
    """PEFT writes the backward pass of LoHa by hand; here torch derives it."""
    from peft.tuners.loha import layer

    def full(w1a, w1b, w2a, w2b, scale):
        return (w1a @ w1b) * (w2a @ w2b) * scale

    def core(t1, w1a, w1b, t2, w2a, w2b, scale):
        sides = (torch.einsum("mn...,mo,ni->oi...", *side) for side in ((t1, w1a, w1b), (t2, w2a, w2b)))
        return math.prod(sides) * scale

    with mock.patch.object(layer, "make_weight", full), mock.patch.object(layer, "make_weight_cp", core):
        yield


@contextmanager
def boft_without_cuda():
    """PEFT's butterflies of more than one factor need its CUDA kernel, which does no more than this."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    with mock.patch.object(layer, "get_fbd_cuda", lambda: True), mock.patch.object(
        layer, "FastBlockDiag", BlockDiagonal
    ):
        yield


def peft_cases():
    lora = lambda **given: peft.LoraConfig(r=4, lora_alpha=6, **given)  # noqa: E731
    loha = lambda **given: peft.LoHaConfig(r=3, alpha=2, **given)  # noqa: E731
    lokr = lambda r=2, alpha=5, **given: peft.LoKrConfig(r=r, alpha=alpha, **given)  # noqa: E731
    oft = lambda **given: peft.OFTConfig(**({"oft_block_size": 4} | given))  # noqa: E731

    def case(name, which, algorithm, config, note="", **given):
        PeftCase(f"peft-{name}", which, algorithm, config, note, **given).make()

    case("lora-linear", "linear", "lora", lora())
    case("lora-rslora-linear", "linear", "lora", lora(use_rslora=True), "scale = alpha / sqrt(rank)")
    case("lora-conv3x3", "conv3x3", "lora", lora())
    case("lora-conv1x1", "conv1x1", "lora", lora())
    case(
        "lora-conv-grouped", "grouped", "lora", lora(),
        "lora_A sees all input channels (groups 1), only lora_B is grouped: the change is no grouped weight, "
        "so effective is over all input channels, for groups 1",
    )  # fmt: skip
    case("lora-embedding", "embedding", "lora", lora())
    case("dora-linear", "linear", "lora", lora(use_dora=True), "magnitude per output row")
    case("dora-square", "square", "lora", lora(use_dora=True), "magnitude per output row")
    case("dora-conv3x3", "conv3x3", "lora", lora(use_dora=True), "magnitude per output channel, stored [1,out,1,1]")
    case("dora-conv1x1", "conv1x1", "lora", lora(use_dora=True), "magnitude per output channel, stored [1,out,1,1]")
    case(
        "dora-embedding", "embedding", "lora", lora(use_dora=True),
        "magnitude per column (embedding dimension), norm over all rows",
    )  # fmt: skip

    case("loha-linear", "linear", "loha", loha())
    case("loha-conv3x3", "conv3x3", "loha", loha(use_effective_conv2d=False))
    case("loha-conv3x3-effective", "conv3x3", "loha", loha(use_effective_conv2d=True))
    case("loha-conv-grouped", "grouped", "loha", loha(use_effective_conv2d=False))

    always = "scale = alpha / rank although both factors are whole"
    case("lokr-linear", "linear", "lokr", lokr())
    case("lokr-linear-full", "linear", "lokr", lokr(r=8), always)
    case("lokr-linear-both", "linear", "lokr", lokr(r=1, alpha=2, decompose_both=True))
    case("lokr-linear-factor2", "linear", "lokr", lokr(decompose_factor=2))
    case(
        "lokr-linear-factor4", "linear", "lokr", lokr(decompose_factor=4),
        "a factor that divides the width goes first even when it is the larger one: 12 = 4 * 3",
    )  # fmt: skip
    case("lokr-conv3x3", "conv3x3-wide", "lokr", lokr(use_effective_conv2d=False))
    case("lokr-conv3x3-effective", "conv3x3-wide", "lokr", lokr(use_effective_conv2d=True))
    case("lokr-conv3x3-full", "conv3x3", "lokr", lokr(r=8), always)
    case("lokr-conv-grouped", "grouped", "lokr", lokr(r=1, alpha=2))

    neumann = "R = I + 2Q + 2Q^2 + 2Q^3 + Q^4, the truncated series of the inverse of the exact rotation"
    exact = "R = (I - Q)(I + Q)^-1"
    case("oft-linear-neumann", "linear", "oft", oft(use_cayley_neumann=True), neumann)
    case("oft-linear", "linear", "oft", oft(use_cayley_neumann=False), exact)
    case(
        "oft-linear-neumann3", "linear", "oft", oft(use_cayley_neumann=True, num_cayley_neumann_terms=3),
        "R = I + 2Q + Q^2 would be the pattern; the loop gives I + 2Q + 3Q^2 + Q^3... see effective",
    ) if False else None  # fmt: skip
    case("oft-square", "square", "oft", oft(use_cayley_neumann=False), exact)
    case("oft-linear-shared", "linear", "oft", oft(block_share=True), neumann + "; one block for all")
    case(
        "oft-linear-constrained", "linear", "oft", oft(coft=True, eps=0.5, use_cayley_neumann=False),
        exact + "; each forward first shortens every block's Q to norm eps / sqrt(blocks) in place, outside the "
        "gradient; the file holds the shortened ones",
    )  # fmt: skip
    case("oft-conv1x1", "conv1x1", "oft", oft(oft_block_size=3), neumann)
    case("oft-embedding", "embedding", "oft", oft(), neumann)
    PeftCase.weight_change = False
    case(
        "oft-conv3x3", "conv3x3", "oft", oft(oft_block_size=9, use_cayley_neumann=False),
        exact + "; no effective weight: live unfolds the input into overlapping patches (stride 1, no padding), rotates "
        "them and sums them back before the convolution; merged is the peer's merged weight",
    )  # fmt: skip
    PeftCase.weight_change = True

    boft = "Q = (I - S)(I + S)^-1, S = (R - R^T) / 2; effective = s * (W Q^T), the bias is not scaled"
    case("boft-linear", "linear", "boft", peft.BOFTConfig(boft_block_size=4), boft)
    case("boft-conv3x3", "conv3x3", "boft", peft.BOFTConfig(boft_block_size=6), boft + "; boft_s is [1,out] here")
    case("boft-conv1x1", "conv1x1", "boft", peft.BOFTConfig(boft_block_size=2), boft + "; boft_s is [1,out] here")
    two = "; made with a plain block diagonal in place of the peer's CUDA kernel, without which the peer falls back to one factor"
    with boft_without_cuda():
        case("boft-square-factor2", "square", "boft", peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2), boft + two)
        case("boft-square-factor3", "square", "boft", peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3), boft + two)
        case(
            "boft-conv1x1-factor2", "conv1x1", "boft", peft.BOFTConfig(boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2), boft + two
        ) if False else None

    case("ia3-linear-feedforward", "linear", "ia3", peft.IA3Config(feedforward_modules=["layer"]), "scales the input")
    scaled = "scales the output, the bias with it"
    case("ia3-linear", "linear", "ia3", peft.IA3Config(feedforward_modules=[]), scaled)
    case("ia3-conv3x3-feedforward", "conv3x3", "ia3", peft.IA3Config(feedforward_modules=["layer"]), "scales the input")
    case("ia3-conv3x3", "conv3x3", "ia3", peft.IA3Config(feedforward_modules=[]), scaled)
    case("ia3-conv-grouped-feedforward", "grouped", "ia3", peft.IA3Config(feedforward_modules=["layer"]), "scales the input")

    vera = lambda: peft.VeraConfig(r=5, save_projection=True)  # noqa: E731
    case("vera-linear", "linear", "vera", vera())
    case(
        "vera-linear-sliced", "linear", "vera", vera(),
        "another adapted layer, 24 -> 32, makes the shared projections larger: first columns of vera_A, first rows of vera_B",
        other=nn.Linear(24, 32),
    )  # fmt: skip

    glora = lambda **given: peft.GloraConfig(r=3, **given)  # noqa: E731
    rule = "W + W * A + B elementwise, b + b * D + E + W C"
    case("glora-linear", "linear", "glora", glora(), rule)
    case("glora-linear-vector", "linear", "glora", glora(config_A_B="vector", config_C="vector", config_D_E="vector"), rule)
    case("glora-linear-constant", "linear", "glora", glora(config_A_B="constant", config_C="lora", config_D_E="constant"), rule)
    case("glora-linear-none", "linear", "glora", glora(config_A_B="lora", config_C="none", config_D_E="none"), rule)


# LyCORIS


class LycorisCase(Case):
    peer = LYCORIS

    def __init__(self, name, which, cls, options, note=""):
        super().__init__(name, which, cls.name, options, note)
        torch.manual_seed(zlib.crc32(name.encode()))
        self.module = cls("layer", self.layer, multiplier=1.0, **options)
        self.module.apply_to()
        self.cls = cls
        self.module.eval()
        self.wide = "oft" not in cls.name and not options.get("weight_decompose")
        for key, value in sorted(self.module.named_parameters()):
            value.data.copy_(self.value(key, value.data))

    def value(self, key, start):
        if key == "dora_scale":
            return start * (1 + normal(start.shape, self.draw, 0.2))
        if key == "scalar":
            return torch.tensor(0.7)
        if self.cls is FullModule:
            return start + normal(start.shape, self.draw, 0.3)
        return normal(start.shape, self.draw, 0.3, 1.0 if key == "rescale" else 0.0)

    def live(self, x):
        return self.layer(x)

    def double(self):
        self.layer.double()
        self.module.double()
        if self.cls is FullModule:
            self.module._org_weight = [self.module._org_weight[0].double()]
            self.module.org_bias = [self.module.org_bias[0].double()]

    def file(self):
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def written_options(self):
        return self.options

    def trained(self):
        return dict(sorted(self.module.named_parameters()))

    def reported(self, gradients):
        """By the file's keys. A trained scalar is folded into one tensor of the file: the gradient of that product."""
        if self.cls is FullModule:
            return {{"weight": "diff", "bias": "diff_b"}[key]: value for key, value in gradients.items()}
        gradients = dict(gradients)
        if "scalar" in gradients:
            scalar = self.module.scalar.detach()
            del gradients["scalar"]
            for key in ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a"):
                if key in gradients:
                    gradients[key] = gradients[key] / scalar
        return gradients

    def effective(self, dtype):
        if self.cls is NormModule:
            weight, bias = self.module.get_merged_weight()
            return weight.detach(), bias.detach()
        return super().effective(dtype)

    @torch.no_grad()
    def merged(self):
        return self.module.get_merged_weight(1.0, self.plain.weight.shape, None)


def lycoris_cases():
    def case(name, which, cls, note="", **options):
        LycorisCase(f"lycoris-{name}", which, cls, options, note).make()

    rank = {"lora_dim": 4, "alpha": 2.0}
    folded = "alpha in the file is alpha * sqrt(rank)"
    scalar = "a trained scalar (0.7 here) is folded into the file; the gradient is that of the folded tensor"
    out, into = "magnitude per output, norm + 1.19e-7", "magnitude per input, norm + 1.19e-7"
    case("locon-linear", "linear", LoConModule, **rank)
    case("locon-linear-rslora", "linear", LoConModule, folded, **rank, rs_lora=True)
    case("locon-linear-scalar", "linear", LoConModule, scalar, **rank, use_scalar=True)
    case("locon-conv3x3", "conv3x3", LoConModule, **rank)
    case("locon-conv1x1", "conv1x1", LoConModule, **rank)
    case("locon-conv3x3-tucker", "conv3x3", LoConModule, **rank, use_tucker=True)
    case("locon-conv-grouped", "grouped", LoConModule, "lora_down has in / groups channels", **rank)
    for which in ("linear", "square", "conv3x3"):
        case(f"dora-{which}-out", which, LoConModule, out, **rank, weight_decompose=True, wd_on_out=True)
        case(f"dora-{which}-in", which, LoConModule, into, **rank, weight_decompose=True, wd_on_out=False)
    case("dora-conv-grouped-out", "grouped", LoConModule, out, **rank, weight_decompose=True, wd_on_out=True)

    rank = {"lora_dim": 3, "alpha": 2.0}
    case("loha-linear", "linear", LohaModule, **rank)
    case("loha-linear-rslora", "linear", LohaModule, folded, **rank, rs_lora=True)
    case("loha-linear-scalar", "linear", LohaModule, scalar, **rank, use_scalar=True)
    case("loha-conv3x3", "conv3x3", LohaModule, **rank)
    case("loha-conv3x3-tucker", "conv3x3", LohaModule, **rank, use_tucker=True)
    case("loha-conv-grouped", "grouped", LohaModule, **rank)
    case("loha-dora-linear-out", "linear", LohaModule, out, **rank, weight_decompose=True, wd_on_out=True)
    case("loha-dora-linear-in", "linear", LohaModule, into, **rank, weight_decompose=True, wd_on_out=False)

    rank, one = {"lora_dim": 2, "alpha": 5.0}, {"lora_dim": 1, "alpha": 2.0}
    case("lokr-linear", "linear", LokrModule, **rank)
    case("lokr-linear-rslora", "linear", LokrModule, folded, **rank, rs_lora=True)
    case("lokr-linear-scalar", "linear", LokrModule, scalar, **rank, use_scalar=True)
    whole = "both factors whole: scale 1, the file says alpha = rank"
    case("lokr-linear-full", "linear", LokrModule, whole, **rank, full_matrix=True)
    case(
        "lokr-linear-full-rslora", "linear", LokrModule, "both factors whole with rs_lora: scale sqrt(rank)",
        **rank, full_matrix=True, rs_lora=True,
    )  # fmt: skip
    case("lokr-linear-large-rank", "linear", LokrModule, whole, lora_dim=8, alpha=5.0)
    case("lokr-linear-both", "linear", LokrModule, **one, decompose_both=True)
    case("lokr-linear-factor2", "linear", LokrModule, **rank, factor=2)
    case("lokr-linear-factor4", "linear", LokrModule, "the smaller factor first: 12 = 3 * 4", **rank, factor=4)
    case("lokr-linear-unbalanced", "linear", LokrModule, "output pair swapped: w1 [5,3], w2 [4,4]", **one, unbalanced_factorization=True)
    case("lokr-conv3x3", "conv3x3-wide", LokrModule, **rank)
    case("lokr-conv3x3-tucker", "conv3x3-wide", LokrModule, **rank, use_tucker=True)
    case("lokr-conv3x3-full", "conv3x3", LokrModule, whole, **rank, full_matrix=True)
    case("lokr-conv-grouped", "grouped", LokrModule, **one)
    case("lokr-dora-linear-out", "linear", LokrModule, out, **rank, weight_decompose=True, wd_on_out=True)
    case("lokr-dora-linear-in", "linear", LokrModule, into, **rank, weight_decompose=True, wd_on_out=False)

    output = "W * (1 + weight) per output; the bias is not scaled"
    case("ia3-linear", "linear", IA3Module, output, train_on_input=False)
    case("ia3-linear-input", "linear", IA3Module, "W * (1 + weight) per input", train_on_input=True)
    case("ia3-conv3x3", "conv3x3", IA3Module, output, train_on_input=False)
    case("ia3-conv3x3-input", "conv3x3", IA3Module, "W * (1 + weight) per input", train_on_input=True)

    oft = "output side: block R^T W, R = (I + Q)(I - Q)^-1, Q = blocks - blocks^T"
    limit = "; Q is shortened to norm constraint * outputs over all blocks together (alpha in the file is the constraint)"
    for which in ("linear", "conv3x3"):
        case(f"oft-{which}", which, DiagOFTModule, oft, lora_dim=4)
        case(f"oft-{which}-constrained", which, DiagOFTModule, oft + limit, lora_dim=4, constraint=0.05)
        case(f"oft-{which}-rescaled", which, DiagOFTModule, oft + ", times rescale", lora_dim=4, rescaled=True)
    case("oft-linear-unreached", "linear", DiagOFTModule, oft + "; the constraint is not reached", lora_dim=4, constraint=1.0)
    boft = "output side: butterflies of R W (not transposed), R = (I + Q)(I - Q)^-1"
    for which in ("square", "conv3x3"):
        case(f"boft-{which}", which, ButterflyOFTModule, boft, lora_dim=4)
    case("boft-square-constrained", "square", ButterflyOFTModule, boft + limit, lora_dim=4, constraint=0.05)
    case("boft-square-rescaled", "square", ButterflyOFTModule, boft + ", times rescale", lora_dim=4, rescaled=True)
    case("boft-conv3x3-rescaled", "conv3x3", ButterflyOFTModule, boft + ", times rescale", lora_dim=2, rescaled=True)

    rank = {"lora_dim": 3, "alpha": 2.0}
    glora = "W + scale * (W a1 a2 + b1 b2), a1 [in,r], a2 [r,in]"
    for which in ("linear", "conv1x1", "conv3x3"):
        case(f"glora-{which}", which, GLoRAModule, glora, **rank)
    case(
        "glora-linear-rslora", "linear", GLoRAModule,
        glora + "; scale = alpha / sqrt(rank), but here alpha is written as given, so the file does not tell", **rank, rs_lora=True,
    )  # fmt: skip
    for which in ("linear", "conv3x3"):
        case(f"full-{which}", which, FullModule)
    case("norm-layernorm", "layernorm", NormModule)
    case("norm-groupnorm", "groupnorm", NormModule)


# Initialisations and combinations


def lora_values(model, draw, adapter="default"):
    for key, value in sorted(model.named_parameters()):
        if f".{adapter}." in key:
            value.data.copy_(normal(value.shape, draw, 0.3))


def initial_case(method):
    name = f"init-{method}"
    draw = generator(name)
    layer = base_layer("linear", draw)
    weight = layer.weight.clone()
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=method, target_modules=["layer"])
    torch.manual_seed(0)
    model = peft.get_peft_model(Holder(layer), config)
    tuned = model.base_model.model.layer
    tensors = {"weight": weight, "residual": tuned.base_layer.weight.data.clone()}
    with tempfile.TemporaryDirectory() as folder:
        first, last = Path(folder) / "first", Path(folder) / "last"
        model.peft_config["default"].init_lora_weights = True  # as PEFT documents, for the copy of the first values
        model.save_pretrained(first)
        model.peft_config["default"].init_lora_weights = method
        initial = load_file(first / "adapter_model.safetensors")
        for key, value in sorted(model.named_parameters()):
            if value.requires_grad:
                value.data.add_(normal(value.shape, draw, 0.1))
        trained = {side: getattr(tuned, f"lora_{side}")["default"].weight.data.clone() for side in "AB"}
        model.save_pretrained(last, path_initial_model_for_weight_conversion=str(first))
        converted = load_file(last / "adapter_model.safetensors")
        written = json.loads((last / "adapter_config.json").read_text())
    for side in "AB":
        key = f"lora_{side}.weight"
        tensors[f"file.{key}"] = initial[PREFIX + key]
        tensors[f"trained.lora_{side}"] = trained[side]
        tensors[f"converted.lora_{side}"] = converted[PREFIX + key]
    scale = 8 / 4
    start = tensors["residual"] + scale * tensors["file.lora_B.weight"] @ tensors["file.lora_A.weight"]
    end = tensors["residual"] + scale * trained["B"] @ trained["A"]
    plain = weight + written["lora_alpha"] / written["r"] * tensors["converted.lora_B"] @ tensors["converted.lora_A"]
    assert (start - weight).abs().max() < 1e-5 and (end - plain).abs().max() < 1e-5
    tensors["effective"] = end
    note = {
        "pissa": "file = first values: A = sqrt(S / scale) Vh, B = U sqrt(S / scale), the first singular values; "
        "signs of singular vectors are arbitrary, B A is not",
        "olora": "file = first values: B = first columns of Q, A = first rows of R of W = QR; not divided by the scale, so "
        "residual = W - scale B A; signs of Q's columns are arbitrary, B A is not",
    }[method]
    metadata = {
        "peer": PEFT, "kind": "linear", "layer": "Linear", "algorithm": method, "computed_in": "float32",
        "options": text({
            "r": 4, "lora_alpha": 8, "init_lora_weights": method,
            "converted": {key: written[key] for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora")},
        }),
        "note": note + "; converted: A' = [A; A0], B' = [B, -B0], twice the rank and alpha, on the untouched weight",
    }  # fmt: skip
    write(name, tensors, metadata)


def combination(name, method, alphas=(4, 4, 4), ranks=(4, 4, 4), note="", **given):
    draw = generator(f"combine-{name}")
    weights = [0.7, -0.4, 1.1]
    layer = base_layer("linear", draw)
    weight = layer.weight.clone()
    config = lambda i: peft.LoraConfig(r=ranks[i], lora_alpha=alphas[i], target_modules=["layer"])  # noqa: E731
    torch.manual_seed(0)
    model = peft.get_peft_model(Holder(layer), config(0), adapter_name="0")
    for i in (1, 2):
        model.add_adapter(str(i), config(i))
    tuned, tensors = model.base_model.model.layer, {"weight": weight}
    for i in range(3):
        for side in "AB":
            value = getattr(tuned, f"lora_{side}")[str(i)].weight
            value.data.copy_(normal(value.shape, draw, 0.3))
            tensors[f"adapters.{i}.lora_{side}"] = value.data.clone()
    model.add_weighted_adapter([str(i) for i in range(3)], weights, "result", combination_type=method, **given)
    for side in "AB":
        tensors[f"result.lora_{side}"] = getattr(tuned, f"lora_{side}")["result"].weight.data.clone()
    result = model.peft_config["result"]
    total = sum(
        weights[i] * alphas[i] / ranks[i] * tensors[f"adapters.{i}.lora_B"] @ tensors[f"adapters.{i}.lora_A"]
        for i in range(3)
    )
    made = result.lora_alpha / result.r * tensors["result.lora_B"] @ tensors["result.lora_A"]
    if method == "cat":
        assert (made - total).abs().max() < 1e-5
        note = "the exact sum"
    elif method == "svd":
        U, S, Vh = torch.linalg.svd(total.double())
        best = U[:, : result.r] * S[: result.r] @ Vh[: result.r]
        assert (made - best).abs().max() < 1e-5, f"{name}: {(made - best).abs().max()}"
        note = "the best approximation of the exact sum at that rank; signs of singular vectors are arbitrary, B A is not"
    elif method.endswith("_svd"):
        note = "on the whole updates (scale included), then truncated; signs of singular vectors are arbitrary, B A is not"
    else:
        away = (made - total).abs().max().item()
        note = (note + "; " if note else "") + (
            f"A and B are combined separately, each by sqrt(|weight * scale|), the sign on A: B A is up to {away:.3g} "
            "from the weighted sum of the updates"
        )
    options = {
        "combination_type": method, "weights": weights, "alphas": alphas, "ranks": ranks,
        "density": given.get("density"), "svd_rank": given.get("svd_rank"),
        "majority_sign_method": given.get("majority_sign_method", "total"),
        "result": {"r": result.r, "lora_alpha": result.lora_alpha},
    }  # fmt: skip
    metadata = {
        "peer": PEFT, "kind": "linear", "layer": "Linear", "algorithm": "combine", "computed_in": "float32",
        "options": text(options), "note": note,
    }  # fmt: skip
    write(f"combine-{name}", tensors, metadata)


def combinations():
    other, mixed = (6, 2, 8), {"alphas": (8, 3, 1), "ranks": (4, 3, 2)}
    combination("cat", "cat")
    combination("cat-ranks", "cat", **mixed)
    combination("svd", "svd")
    combination("svd-ranks", "svd", **mixed)
    combination("svd-rank6", "svd", svd_rank=6, **mixed)
    combination("linear", "linear")
    combination("linear-alphas", "linear", alphas=other)
    elected = "signs are elected before the weights are applied; the mean is over the entries that agree"
    for density in ({"density": 0.5},):
        combination("ties", "ties", note=elected, **density)
        combination("ties-frequency", "ties", note=elected, majority_sign_method="frequency", **density)
        combination("ties-alphas", "ties", alphas=other, note=elected, **density)
        combination("ties_svd", "ties_svd", **density)
        combination("ties_svd-frequency", "ties_svd", majority_sign_method="frequency", **density)
        combination("magnitude_prune", "magnitude_prune", **density)
        combination("magnitude_prune_svd", "magnitude_prune_svd", **density)
        combination("magnitude_prune_svd-ranks", "magnitude_prune_svd", **density, **mixed)
    combination("dare_linear", "dare_linear", density=1.0)
    combination("dare_ties", "dare_ties", density=1.0, note=elected)


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    peft_cases()
    lycoris_cases()
    for method in ("pissa", "olora"):
        initial_case(method)
    combinations()
    total = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    assert total < 1_500_000, total
    print(f"{len(list(FOLDER.glob('*.safetensors')))} files, {total} bytes")


if __name__ == "__main__":
    main()
