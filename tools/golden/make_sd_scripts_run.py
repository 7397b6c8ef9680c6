"""sd_scripts_run.json: losses and learning rates of ten steps that sd-scripts' formulas give for the configuration in it, on the
draws that a run here has. Pictures, captions, weights and draws are made here anew, from their definitions alone; what is
computed of them is diffusers', transformers', PEFT's and PyTorch's. Needs CLIP's merges, which `crates/lora-data/assets` has."""

import gzip
import json
import math
import pathlib
import tempfile

import numpy as np
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTokenizer, get_cosine_schedule_with_warmup

import synthetic
import tiny
import training

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What the configuration below says, by sd-scripts' meaning of its keys.
CONFIG = """\
pretrained_model_name_or_path = "BASE"
train_data_dir = "PICTURES"
output_dir = "OUT"
resolution = "128,128"
caption_extension = ".txt"
cache_latents = true
train_batch_size = 2
gradient_accumulation_steps = 2
max_train_steps = 10
network_module = "networks.lora"
network_dim = 4
unet_lr = 4e-3
text_encoder_lr = 1e-3
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 3
mixed_precision = "no"
save_precision = "float"
seed = 7
clip_skip = 2
min_snr_gamma = 5
noise_offset = 0.05
"""
STEPS, SEED, RANK, SIDE, PICTURES = 10, 7, 4, 128, 4
# There alpha is 1 where no key says it.
ALPHA = 1


class Stream:
    """Numbers by what they are for: Philox blocks under a key that purposes and indices make."""

    def __init__(self, key):
        self.key = key

    def block(self, counter):
        return [int(word) for word in synthetic.philox4x32(counter, (self.key & 0xFFFFFFFF, self.key >> 32))]

    def below_this(self, index):
        low, high, *_ = self.block((index & 0xFFFFFFFF, index >> 32, 0xFFFFFFFF, 0xFFFFFFFF))
        return Stream(high << 32 | low)

    def at(self, purpose):
        return self.below_this(synthetic.fnv1a64(purpose.encode()))

    def words(self, count):
        return [word for block in range(-(-count // 4)) for word in self.block((block, 0, 0, 0))][:count]

    def normals(self, shape):
        """Box-Muller on pairs of words, in float64."""
        count = math.prod(shape)
        pairs = np.array(self.words(2 * -(-count // 2)), dtype=np.float64).reshape(-1, 2)
        radius = np.sqrt(-2 * np.log((pairs[:, 0] + 1) / 2**32))
        angle = 2 * np.pi * (pairs[:, 1] / 2**32)
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    def below(self, bound):
        """Lemire's multiplication; the draws here meet no rejection."""
        low, high = self.words(2)
        product = (high << 32 | low) * bound
        assert product % 2**64 >= 2**64 % bound
        return product >> 64

    def kaiming(self, shape):
        """Uniform in one over the root of the fan-in."""
        uniform = np.array(self.words(math.prod(shape)), dtype=np.uint64) >> np.uint64(8)
        values = (2 * uniform.astype(np.float32) * np.float32(2**-24) - 1) * np.float32(1 / math.sqrt(math.prod(shape[1:])))
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def picture(index):
    """Red, green and blue by place, in 0 to 255."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([np.full_like(x, 60 * index), 2 * x, (x * y) // 64], -1).astype(np.uint8)


def tokenizer():
    merges = gzip.open(ROOT / "crates/lora-data/assets/clip_merges.txt.gz", "rt").read().splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    words = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = pathlib.Path(folder, "vocab.json"), pathlib.Path(folder, "merges.txt")
        files[0].write_text(json.dumps({word: place for place, word in enumerate(words)}))
        files[1].write_text("#version: 0.2\n" + "\n".join(merges))
        return CLIPTokenizer(*map(str, files))


def adapted():
    unet, texts = tiny.unet(), tiny.text_encoders()
    targets = training.default_targets(unet, texts, convolutions=False)
    groups = []
    for component, network in {"unet": unet, **texts}.items():
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets[component], lora_dropout=0.0, bias="none")
        inject_adapter_in_model(config, network)
        group = []
        for path, module in network.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            canonical = tiny.text_name(path) if component.startswith("text_encoder") else path
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            begin = Stream(SEED).at("adapter").at(f"{component}.{canonical}").at("down")
            with torch.no_grad():
                down.copy_(begin.kaiming(tuple(down.shape)))
                up.zero_()
            group += [down.requires_grad_(True), up.requires_grad_(True)]
        groups.append(group)
    return unet, texts["text_encoder"], groups


def main():
    unet, text, (unet_group, text_group) = adapted()
    vae, schedule = tiny.vae(), DDPMScheduler(**tiny.SCHEDULE, clip_sample=False)
    with torch.no_grad():
        pixels = [torch.from_numpy(picture(i)).permute(2, 0, 1)[None] / 127.5 - 1 for i in range(PICTURES)]
        latents = [vae.encode(own).latent_dist for own in pixels]
        # Latents that are cached are drawn once.
        draws = [Stream(SEED).at("cache").below_this(i).at("latent") for i in range(PICTURES)]
        latents = [(own.mean + own.std * draw.normals(own.mean.shape)) * vae.config.scaling_factor
                   for own, draw in zip(latents, draws)]
    rows = tokenizer()([f"picture number {i}" for i in range(PICTURES)], padding="max_length", max_length=77,
                       return_tensors="pt").input_ids
    groups = [{"params": unet_group, "lr": 4e-3}, {"params": text_group, "lr": 1e-3}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
    rates = get_cosine_schedule_with_warmup(optimiser, 3, STEPS)
    losses, learning_rates = [], []
    for step in range(STEPS):
        optimiser.zero_grad()
        total = 0.0
        for index in range(PICTURES):
            draw = Stream(SEED).at("visit").below_this(step).below_this(index).below_this(0)
            clean = latents[index]
            noise = draw.at("noise").normals(clean.shape)
            noise = noise + 0.05 * draw.at("noise_offset").normals((1, 4, 1, 1))
            time = torch.tensor([draw.at("timestep").below(1000)])
            states = text(rows[index:index + 1], output_hidden_states=True).hidden_states[-2]
            inner = getattr(text, "text_model", text)
            states = inner.final_layer_norm(states)
            answer = unet(schedule.add_noise(clean, noise, time), time, states).sample
            alpha = schedule.alphas_cumprod[time].float()
            snr = alpha / (1 - alpha)
            loss = (answer - noise).square().mean() * (torch.clamp(snr, max=5) / snr)[0]
            (loss / PICTURES).backward()
            total += loss.item() / PICTURES
        torch.nn.utils.clip_grad_norm_(unet_group + text_group, 1.0)
        learning_rates.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        rates.step()
        losses.append(total)
        print(f"  step {step + 1}: {total:.6f}, learning rates {learning_rates[-1]}")
    norms = [math.sqrt(sum(p.detach().double().square().sum().item() for p in group)) for group in (unet_group, text_group)]
    made = {"config": CONFIG, "losses": losses, "learning_rates": learning_rates, "final_norms": norms}
    path = ROOT / "crates/lora-train/tests/golden/sd_scripts_run.json"
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
