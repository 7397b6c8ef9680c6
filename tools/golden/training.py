"""LoRA on the tiny model through PEFT, and the training loss."""

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

import synthetic
import tiny
from tiny import given

RANK, ALPHA = 4, 2.0
BATCH = (2, 4, 16, 16)  # 2 x 2 in the middle block: at 1 x 1 its group norms see two numbers, and training is chaotic


def ending(text, ends):
    """Module paths of a text encoder that end so."""
    return sorted(name for name, _ in text.named_modules() if name.endswith(ends))


def default_targets(unet, texts, convolutions):
    """Module paths by component: the linears and 1x1 convolutions of the transformers, with `convolutions` also those of
    resnets and samplers; the text encoders' attention and MLP."""
    kinds = {"Transformer2DModel"}
    if convolutions:
        kinds |= {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
    found = set()
    for path, module in unet.named_modules():
        if type(module).__name__ in kinds:
            for inner, layer in module.named_modules():
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                    found.add(f"{path}.{inner}")
    ends = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return {"unet": sorted(found)} | {component: ending(text, ends) for component, text in texts.items()}


def attention_targets(unet, texts):
    """Module paths by component of all query, key, value and output projections."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    text_ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    found = {"unet": sorted(name for name, _ in unet.named_modules() if name.endswith(ends))}
    return found | {component: ending(text, text_ends) for component, text in texts.items()}


def inject(model, component, targets, zero_up):
    """Adapts exactly `targets`; returns {tensor name: parameter}."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, model)
    parameters = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        assert module.scaling["default"] == ALPHA / RANK
        canonical = tiny.text_name(path) if component.startswith("text_encoder") else path
        for part, layer in (("down", module.lora_A["default"]), ("up", module.lora_B["default"])):
            name, parameter = f"lora.{component}.{canonical}.{part}", layer.weight
            shape = tuple(parameter.shape)
            with torch.no_grad():
                if part == "down":
                    parameter.copy_(torch.from_numpy(synthetic.weight(name, shape)))
                elif zero_up:
                    parameter.zero_()
                else:
                    parameter.copy_(torch.from_numpy(synthetic.lora_up(name, shape)))
            parameter.data = parameter.data.to(tiny.DTYPE)
            parameters[name] = parameter.requires_grad_(True)
    assert len(parameters) == 2 * len(targets), (component, len(parameters), len(targets))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters.values()}
    return parameters


def model(targets, zero_up):
    """The U-Net and the text encoders with adapters, and all adapter parameters by name."""
    unet, texts = tiny.unet(), tiny.text_encoders()
    chosen, parameters = targets(unet, texts), {}
    for component, network in {"unet": unet, **texts}.items():
        parameters |= inject(network, component, chosen[component], zero_up)
    return unet, texts, dict(sorted(parameters.items()))


SCHEDULER = DDPMScheduler(**tiny.SCHEDULE, clip_sample=False)


def loss(unet, texts, latents, noise, timesteps, min_snr_gamma=None):
    """Mean squared error of the prediction; with gamma, each item weighted by min(SNR, gamma) / SNR, or / (SNR + 1) where
    velocity is predicted."""
    velocity = SCHEDULER.config.prediction_type == "v_prediction"
    target = SCHEDULER.get_velocity(latents, noise, timesteps) if velocity else noise
    noised = SCHEDULER.add_noise(latents, noise, timesteps)
    context, added = tiny.conditions(texts, [tiny.training_rows(pad) for pad in tiny.PADS])
    answer = unet(noised, timesteps, context, added_cond_kwargs=added).sample
    each = torch.nn.functional.mse_loss(answer, target, reduction="none").mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        alphas = SCHEDULER.alphas_cumprod[timesteps].to(tiny.DTYPE)
        snr = alphas / (1.0 - alphas)
        each = each * torch.clamp(snr, max=min_snr_gamma) / (snr + 1.0 if velocity else snr)
    return each.mean()


def latents():
    """The latents of both training goldens."""
    return given("input.train.latents", BATCH)


def flow_trajectory(model, targets, velocity, batch, sigmas):
    """Steps of AdamW on a transformer that answers with velocities, from a LoRA on `targets` whose `up` is zero: `sigmas`, those of
    each step's items, losses, the first step's gradients and the factors in the end. `velocity` is of the model, noised latents and
    sigmas."""
    parameters = inject(model, "transformer", targets, zero_up=True)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    latents, losses = given("input.train.latents", batch), []
    for step, levels in enumerate(sigmas):
        noise, share = given(f"input.trajectory.{step}.noise", batch), levels.view(-1, 1, 1, 1)
        answer = velocity(model, (1 - share) * latents + share * noise, levels)
        loss = (answer - (noise - latents)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            # Factors beside those that are zero have no gradient yet, and some layers of the last block never get one.
            read = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
            first = {f"gradient.{name}": own.clone() for name, own in read.items() if own.abs().max() > 0}
        optimiser.step()
        losses.append(loss.detach().double())
    print(f"  losses {losses[0]:.6f} to {losses[-1]:.6f}, {len(losses)} steps, {len(parameters)} factors")
    final = {f"trajectory.final.{name}": parameter.detach() for name, parameter in parameters.items()}
    return {"trajectory.sigmas": sigmas, "trajectory.losses": torch.stack(losses)} | final | first
