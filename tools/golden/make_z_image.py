"""z_image/expected.safetensors: what diffusers, transformers and PEFT make of a tiny model of Z-Image's kind: captions'
states, latents, velocities, gradients of a LoRA, 20 steps of AdamW and four steps of the pipeline's sampler. Weights and
inputs are made from their names (`synthetic.py`); `z_image/tokenizer` is a tiny vocabulary with Qwen3's special tokens and
chat template."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

import files
import synthetic
import training

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

WIDTH, HEADS, LAYERS, CAPTION = 64, 2, 2, 32
TRANSFORMER = dict(
    in_channels=16, dim=WIDTH, n_layers=LAYERS, n_refiner_layers=2, n_heads=HEADS, n_kv_heads=HEADS,
    cap_feat_dim=CAPTION, axes_dims=[8, 12, 12], axes_lens=[1024, 128, 128],
)
TEXT = dict(
    vocab_size=640, hidden_size=CAPTION, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
    tie_word_embeddings=True,
)
VAE = dict(
    latent_channels=16, block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32, scaling_factor=0.3611,
    shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
)
PROMPTS = [
    "a photo of a cat, sitting on the window-sill; it's 7 o'clock",
    "",
    "Größe 漢字 🙂 <|im_end|> (word:1.2)",
    ", ".join(f"tag {n}" for n in range(24)),
]
STEPS, BATCH = 20, (2, 16, 8, 8)
# Latents and captions' lengths of the calls of the transformer: no multiples of 32, in one batch one and two of them.
CALLS = {"square": ((1, 16, 6, 10), [24]), "wide": ((2, 16, 8, 16), [40, 11])}
SIGMAS = {"square": [0.5], "wide": [0.0625, 0.984375]}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def filled(model, component):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(synthetic.weight(f"{component}.{name}", tuple(parameter.shape))))
    return model.eval().requires_grad_(False)


def given(name, shape):
    return torch.from_numpy(synthetic.activation(name, tuple(shape)))


def transformer():
    return filled(ZImageTransformer2DModel(**TRANSFORMER), "transformer")


def pipeline():
    tokenizer = Qwen2Tokenizer.from_pretrained(files.FOLDER / "z_image" / "tokenizer")
    text = filled(Qwen3ForCausalLM(Qwen3Config(**TEXT)), "text_encoder")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, filled(AutoencoderKL(**VAE), "vae"), text, tokenizer, transformer())


def velocity(model, latents, sigmas, captions):
    """Noise minus data; `captions` are states of any length each."""
    return -torch.stack(model(list(latents.unsqueeze(2)), 1 - sigmas, captions).sample)[:, :, 0]


def captions(name, lengths):
    states = given(name, (len(lengths), max(lengths), CAPTION))
    return [own[:length] for own, length in zip(states, lengths)]


def drawn_sigmas():
    words = synthetic.words("input.trajectory.sigmas", 2 * STEPS) % 1023 + 1
    return torch.tensor(words.astype("int64")).reshape(STEPS, 2) / 1024


def loss(model, noise, sigmas, texts):
    latents, share = given("input.train.latents", BATCH), sigmas.view(-1, 1, 1, 1)
    answer = velocity(model, (1 - share) * latents + share * noise, sigmas, texts)
    return (answer - (noise - latents)).square().mean()


def adapted(zero_up):
    model = transformer()
    targets = [name for name, _ in model.named_modules() if name.startswith("layers.") and name.endswith(TARGETS)]
    return model, training.inject(model, "transformer", sorted(targets), zero_up)


def main():
    made, pipe = {}, pipeline()
    with torch.no_grad():
        texts = pipe._encode_prompt(list(PROMPTS))
        made |= {f"text.{index}": states for index, states in enumerate(texts)}
        encoded = pipe.vae.encode(given("input.vae.pixels", (2, 3, 64, 48))).latent_dist
        made["vae.mean"], made["vae.logvar"] = encoded.mean, encoded.logvar
        made["vae.normalised"] = (encoded.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        made["vae.decoded"] = pipe.vae.decode(given("input.vae.latents", (2, 16, 8, 6))).sample
        for call, (shape, lengths) in CALLS.items():
            states = captions(f"input.{call}.captions", lengths)
            latents = given(f"input.{call}.latents", shape)
            made[f"velocity.{call}"] = velocity(pipe.transformer, latents, torch.tensor(SIGMAS[call]), states)
        noise = given("input.sample.noise", (1, 16, 8, 12))
        for name, guidance in (("sample.plain", 0.0), ("sample.guided", 2.0)):
            made[name] = pipe(
                prompt=PROMPTS[0], negative_prompt=PROMPTS[1], latents=noise.clone(), output_type="latent", height=64, width=96,
                num_inference_steps=4, guidance_scale=guidance,
            ).images
        made["sample.sigmas"] = pipe.scheduler.sigmas

    model, parameters = adapted(zero_up=False)
    found = loss(model, given("input.train.noise", BATCH), torch.tensor([0.25, 0.75]), captions("input.train.captions", [24, 9]))
    found.backward()
    made["loss"] = found.double()
    made |= {name: parameter.grad for name, parameter in parameters.items()}

    model, parameters = adapted(zero_up=True)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for step, sigmas in enumerate(drawn_sigmas()):
        found = loss(model, given(f"input.trajectory.{step}.noise", BATCH), sigmas, [texts[0], texts[2]])
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        losses.append(found.detach().double())
    made["trajectory.sigmas"], made["trajectory.losses"] = drawn_sigmas(), torch.stack(losses)
    made |= {f"trajectory.final.{name}": parameter.detach() for name, parameter in parameters.items()}
    print(f"  losses {losses[0]:.6f} to {losses[-1]:.6f}; captions of {[len(text) for text in texts]} states")
    files.write("z_image/expected.safetensors", made)


if __name__ == "__main__":
    main()
