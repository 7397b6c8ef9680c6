"""noise_levels.json: noise levels that trainers draw, of given draws: `z` standard normal, `u` even. Formulas are those of
diffusers' `compute_density_for_timestep_sampling` (which is run beside them), of its pipelines' `calculate_shift` and of
sd-scripts' `timestep_sampling`."""

import json
import math

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

import files

generator = torch.Generator().manual_seed(5)
z = ((torch.randn(12, generator=generator) * 64).round() / 64).double()
u = ((torch.rand(12, generator=generator) * 1023).round() / 1024).double()
rows = []


def moved(levels, factor):
    return levels * factor / (1 + (factor - 1) * levels)


def row(density, levels, shift=1.0, tokens=None, **settings):
    if isinstance(shift, str):
        most = {"flux": (4096, 1.15), "qwen": (8192, 0.9)}[shift]
        levels = moved(levels, math.exp(calculate_shift(tokens, 256, most[0], 0.5, most[1])))
    else:
        levels = moved(levels, shift)
    rows.append({"density": density, "shift": shift, "tokens": tokens, **settings, "levels": [round(own, 9) for own in levels.tolist()]})


def check(scheme, levels, draws, **settings):
    """Holds a formula against diffusers' own on its own draws."""
    torch.manual_seed(3)
    expected = compute_density_for_timestep_sampling(scheme, 7, **settings)
    torch.manual_seed(3)
    assert torch.allclose(levels(draws(7)), expected), scheme


def logit_normal(draws, mean=0.0, deviation=1.0):
    return torch.sigmoid(mean + deviation * draws)


def mode(draws, scale=1.29):
    return 1 - draws - scale * (torch.cos(math.pi * draws / 2) ** 2 - 1 + draws)


check("logit_normal", logit_normal, torch.randn, logit_mean=0.0, logit_std=1.0)
check("mode", mode, torch.rand, mode_scale=1.29)
row("uniform", u)
row("uniform", u, shift=3.0)
row("mode", mode(u), scale=1.29)
for mean, deviation in ((0.0, 1.0), (0.0, 0.5), (-0.5, 1.25)):
    row("logit_normal", logit_normal(z, mean, deviation), mean=mean, deviation=deviation)
for shift in (3.0, 2.2, 0.5):
    row("logit_normal", logit_normal(z), shift=shift, mean=0.0, deviation=1.0)
for name in ("flux", "qwen"):
    for tokens in (1024, 3840, 4096):
        row("logit_normal", logit_normal(z), shift=name, tokens=tokens, mean=0.0, deviation=1.0)

path = files.FOLDER / "noise_levels.json"
path.write_text(json.dumps({"z": z.tolist(), "u": u.tolist(), "rows": rows}, indent=1) + "\n")
print(f"{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")
