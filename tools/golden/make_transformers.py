"""NAME.safetensors for each transformer below: velocities of a tiny model of that kind, and the gradients of a LoRA on
its blocks; t5.safetensors: states of a tiny T5 encoder; text_conditioner.safetensors: what a tiny one of Anima's makes of
states and T5 tokens. Weights are made from their names (`synthetic.py`)."""

import sys

import torch
from diffusers import (
    AnimaTextConditioner,
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from transformers import T5Config, T5EncoderModel

import files
import synthetic
import tiny
import training
from tiny import given

# Latents' channels, height and width, and text tokens, of two calls.
CALLS = {"square": (1, 16, 8, 8, 12), "wide": (2, 16, 4, 12, 20)}
SIGMAS = {"square": [0.5], "wide": [0.0625, 0.984375], "train": [0.25, 0.75]}
GUIDANCE = 3.5


def pack(x):
    """2 x 2 patches as tokens, the numbers of each by channel, row and column."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(x, h, w):
    b, _, c = x.shape
    return x.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def places(h, w):
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None]
    return ids.reshape(-1, 3)


def flux_velocity(model, x, sigma, context, pooled):
    b, _, h, w = x.shape
    guidance = torch.full((b,), GUIDANCE) if model.config.guidance_embeds else None
    out = model(
        pack(x), encoder_hidden_states=context, pooled_projections=pooled, timestep=sigma, guidance=guidance,
        img_ids=places(h, w), txt_ids=torch.zeros(context.shape[1], 3),
    ).sample
    return unpack(out, h, w)


def chroma_velocity(model, x, sigma, context, _):
    _, _, h, w = x.shape
    out = model(
        pack(x), encoder_hidden_states=context, timestep=sigma, img_ids=places(h, w),
        txt_ids=torch.zeros(context.shape[1], 3),
    ).sample
    return unpack(out, h, w)


def anima_velocity(model, x, sigma, context, _):
    """The mask of what fills a picture up is zero: as a channel of the input, so that nothing has to be resized."""
    x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    return model(x.unsqueeze(2), timestep=sigma, encoder_hidden_states=context).sample.squeeze(2)


def sd3_velocity(model, x, sigma, context, pooled):
    return model(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=sigma * 1000).sample


def flux2_velocity(model, x, sigma, context, _):
    b, _, h, w = x.shape
    ids = torch.zeros(h // 2, w // 2, 4)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None]
    text = torch.zeros(context.shape[1], 4)
    text[:, 3] = torch.arange(context.shape[1])
    guidance = torch.full((b,), GUIDANCE) if model.config.guidance_embeds else None
    out = model(
        pack(x), encoder_hidden_states=context, timestep=sigma, guidance=guidance, img_ids=ids.reshape(-1, 4), txt_ids=text,
    ).sample
    return unpack(out, h, w)


def qwen_velocity(model, x, sigma, context, _):
    """Of the second item of a batch the last three text tokens are no caption's."""
    b, _, h, w = x.shape
    mask = torch.ones(b, context.shape[1], dtype=torch.long)
    mask[1:, -3:] = 0
    out = model(
        pack(x), encoder_hidden_states=context, encoder_hidden_states_mask=mask if b > 1 else None, timestep=sigma,
        img_shapes=[[(1, h // 2, w // 2)]] * b,
    ).sample
    return unpack(out, h, w)


def flux(guidance):
    sizes = dict(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=40, guidance_embeds=guidance, axes_dims_rope=(4, 14, 14),
    )
    return FluxTransformer2DModel(**sizes), flux_velocity, (48, 40)


def chroma():
    sizes = dict(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(4, 14, 14), approximator_num_channels=32, approximator_hidden_dim=40,
        approximator_layers=3,
    )
    return ChromaTransformer2DModel(**sizes), chroma_velocity, (48, 0)


def anima():
    sizes = dict(
        in_channels=17, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, text_embed_dim=48,
        adaln_lora_dim=24, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None, concat_padding_mask=False,
    )
    return with_published_norms(CosmosTransformer3DModel(**sizes)), anima_velocity, (48, 0)


def with_published_norms(model):
    """Norms of queries and keys as the model was trained: NVIDIA's code (cosmos-predict2 at 0662ee2,
    cosmos_predict2/models/text2image_dit.py), ComfyUI (06a5766, comfy/ldm/cosmos/predict2.py) and sd-scripts (063ef10,
    library/anima_models.py) add 1e-6 under their root; diffusers has 1e-5, its attention's default."""
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6
    return model


def sd3(**other):
    sizes = dict(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=64, pooled_projection_dim=40,
        pos_embed_max_size=12,
    )
    return SD3Transformer2DModel(**sizes, **other), sd3_velocity, (48, 40)


def flux2():
    sizes = dict(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, mlp_ratio=3.0, axes_dims_rope=(8, 8, 8, 8), rope_theta=2000, guidance_embeds=False,
    )
    return Flux2Transformer2DModel(**sizes), flux2_velocity, (48, 0)


def qwen_image():
    sizes = dict(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    )
    return QwenImageTransformer2DModel(**sizes), qwen_velocity, (48, 0)


MODELS = {
    "flux_dev": lambda: flux(True),
    "flux_schnell": lambda: flux(False),
    "chroma": chroma,
    "anima": anima,
    "sd3": lambda: sd3(),
    "sd35": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux2": flux2,
    "qwen_image": qwen_image,
}
# Those whose training is followed for twenty steps.
TRAJECTORIES = ("flux_dev",)
# Linear layers of the blocks: all but those that shift and scale.
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
MODULATION = ("norm", "_mod.")


def targets(model):
    found = []
    for name, module in model.named_modules():
        own = isinstance(module, torch.nn.Linear) and name.startswith(BLOCKS)
        if own and not any(part in name for part in MODULATION):
            found.append(name)
    return sorted(found)


def transformer(name):
    model, velocity, (context_width, pooled_width) = MODELS[name]()
    tiny.fill(model, "transformer")
    for key, buffer in model.named_buffers():
        if key == "pos_embed.pos_embed":
            buffer.copy_(torch.from_numpy(synthetic.weight(f"transformer.{key}", tuple(buffer.shape))))

    def call(tag, shape, x=None):
        b, _, _, _, tokens = shape
        x = given(f"input.{tag}.latents", shape[:4]) if x is None else x
        context = given(f"input.{tag}.context", (b, tokens, context_width))
        pooled = given(f"input.{tag}.pooled", (b, pooled_width)) if pooled_width else None
        return velocity(model, x, torch.tensor(SIGMAS[tag]), context, pooled)

    with torch.no_grad():
        made = {f"velocity.{tag}": call(tag, shape) for tag, shape in CALLS.items()}
    parameters = training.inject(model, "transformer", targets(model), zero_up=False)
    shape = (2, 16, 8, 8, 12)
    latents, noise = given("input.train.latents", shape[:4]), given("input.train.noise", shape[:4])
    sigma = torch.tensor(SIGMAS["train"]).view(-1, 1, 1, 1)
    loss = (call("train", shape, (1 - sigma) * latents + sigma * noise) - (noise - latents)).square().mean()
    loss.backward()
    made |= {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}
    lost = [key for key, parameter in parameters.items() if parameter.grad is None]
    print(f"  {name}: loss {loss.item():.6f}, {len(parameters)} factors, without gradient: {lost}")
    made["loss"] = loss.detach().double()
    if name in TRAJECTORIES:
        made |= trajectory(name)
    files.write(f"transformers/{name}.safetensors", made)


def trajectory(name):
    """Twenty steps of AdamW from a LoRA whose `up` is zero: losses, and the factors in the end."""
    model, velocity, (context_width, pooled_width) = MODELS[name]()
    tiny.fill(model, "transformer")
    parameters = training.inject(model, "transformer", targets(model), zero_up=True)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    latents = given("input.train.latents", (2, 16, 8, 8))
    context = given("input.train.context", (2, 12, context_width))
    pooled = given("input.train.pooled", (2, pooled_width)) if pooled_width else None
    losses = []
    for step in range(20):
        levels = torch.tensor([(step + 0.5) / 20, ((7 * step) % 20 + 0.5) / 20])
        noise, sigma = given(f"input.trajectory.{step}.noise", (2, 16, 8, 8)), levels.view(-1, 1, 1, 1)
        answer = velocity(model, (1 - sigma) * latents + sigma * noise, levels, context, pooled)
        loss = (answer - (noise - latents)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach().double())
    print(f"  {name}: twenty steps from {losses[0]:.6f} to {losses[-1]:.6f}")
    return {"trajectory.losses": torch.stack(losses)} | {f"trajectory.{key}": value for key, value in parameters.items()}


def t5():
    config = T5Config(
        vocab_size=160, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
        relative_attention_max_distance=128, relative_attention_num_buckets=32, dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    tokens = torch.tensor([[(31 * i * i + 7 * row) % 160 for i in range(200)] for row in range(2)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(synthetic.weight(f"text_encoder_2.{name}", tuple(parameter.shape))))
        made = {"states": model(input_ids=tokens).last_hidden_state}
        mask = (torch.arange(200) < 150).long().expand(2, 200)
        made["seeing_150"] = model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, ::10].contiguous()
    files.write("transformers/t5.safetensors", made)


def text_conditioner():
    """Of states of a caption; and of none, as of an empty one, of which every state is hidden."""
    sizes = dict(
        source_dim=32, target_dim=48, model_dim=64, num_layers=2, num_attention_heads=2, target_vocab_size=160,
        min_sequence_length=1,
    )
    model = tiny.fill(AnimaTextConditioner(**sizes), "text_conditioner")
    tokens = torch.tensor([[(31 * i * i) % 160 for i in range(11)]])
    source, hidden = given("input.conditioner.source", (1, 7, 32)), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        made = {
            "states": model(source, tokens),
            "states.empty": model(torch.zeros(1, 1, 32), tokens, source_attention_mask=hidden),
        }
    files.write("transformers/text_conditioner.safetensors", made)


OTHERS = {"t5": t5, "text_conditioner": text_conditioner}

if __name__ == "__main__":
    for name in sys.argv[1:] or [*OTHERS, *MODELS]:
        OTHERS[name]() if name in OTHERS else transformer(name)
