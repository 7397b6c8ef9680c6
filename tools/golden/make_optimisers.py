"""optimisers.safetensors: 20 steps of each optimiser's reference implementation on given gradients.

    GOLDEN_FOLDER=../../crates/lora-train/tests/golden python make_optimisers.py

First values and gradients follow from names (see synthetic.py and `gradient` below), so the file holds what comes out: the
parameters, for schedule-free AdamW those to save too, for 8-bit AdamW the state. Prints how far the reference itself moves
when it computes in float64, which is what tolerances have to allow for.

bitsandbytes: its CPU update of 8-bit AdamW is used as it is, except for rounding: the C++ quantiser of its CPU backend looks
values up in a coarse table and misses the nearest one by up to 7 codes, so the exact one of its default backend stands in,
as on a GPU.

torch's Muon takes matrices alone and iterates in bf16: here kernels are matrices of an output a row, what is no matrix goes to
torch's AdamW, and the iteration runs in the parameters' own type. pytorch-optimizer counts the steps of a group, so that its
StableAdamW has a group of its own for each tensor, which steps where there is a gradient.
"""

import sys

import bitsandbytes
import bitsandbytes.backends.cpu.ops as cpu_ops
import came_pytorch
import lion_pytorch
import prodigyopt
import pytorch_optimizer
import schedulefree
import torch
import transformers

import files
import synthetic

STEPS = 20
SMALL = {"down": (8, 40), "up": (40, 8), "bias": (33,), "kernel": (4, 5, 3, 3), "gain": (1,)}
# From 4096 numbers on state is in 8 bits; neither is a multiple of 256.
LARGE = {**SMALL, "wide": (66, 63), "flat": (4100,)}


def uniform(name, shape):
    return torch.from_numpy(synthetic.uniform(f"optimiser.{name}", shape)).reshape(shape)


def first(name, shape):
    """Up-projections begin at zero."""
    return torch.zeros(shape) if name == "up" else 0.1 * uniform(name, shape)


def gradient(name, shape, step):
    """A part that stays, a part that changes, and every third number of some steps zero; none of `bias` at two steps."""
    if name == "bias" and step in (3, 8):
        return None
    made = 0.01 * uniform(f"{name}.slope", shape) + 0.005 * uniform(f"{name}.slope.{step}", shape)
    if step % 4 == 1:
        made.view(-1)[::3] = 0
    return made


def factor(step):
    """A warm-up of four steps, then slowly down."""
    return min((step + 1) / 4, 1.0) * (1 - step / 40)


def exact_quantiser():
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    quantise = torch.ops.bitsandbytes.quantize_blockwise.default

    def quantised(numbers, code, largest, codes, blocksize):
        new_codes, new_largest = quantise.redispatch(keys, numbers, code, blocksize)
        codes.copy_(new_codes)
        largest.copy_(new_largest)

    cpu_ops._quant_blockwise_fp32_direct = quantised


class Each:
    """An optimiser for each tensor, which steps where the tensor has a gradient."""

    def __init__(self, parameters, make):
        self.own = [(parameter, make(parameter)) for parameter in parameters]
        self.param_groups = [group for _, optimiser in self.own for group in optimiser.param_groups]
        self.state = {parameter: optimiser.state[parameter] for parameter, optimiser in self.own}

    def step(self):
        for parameter, optimiser in self.own:
            if parameter.grad is not None:
                optimiser.step()


class MatrixView:
    """A matrix that shares the numbers of a tensor, and its optimiser."""

    def __init__(self, parameter, make):
        self.parameter = parameter
        self.matrix = torch.nn.Parameter(parameter.detach().view(len(parameter), -1))
        self.optimiser = make([self.matrix])
        self.param_groups, self.state = self.optimiser.param_groups, {parameter: {}}

    def step(self):
        self.matrix.grad = self.parameter.grad.reshape(self.matrix.shape)
        # The iteration in the type that is there.
        half, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, torch.Tensor.clone
        try:
            self.optimiser.step()
        finally:
            torch.Tensor.bfloat16 = half


def muon(parameters, weight_decay=0.01, adamw={}, **settings):
    def own(parameter):
        if parameter.ndim < 2:
            return torch.optim.AdamW([parameter], lr=1e-3, weight_decay=weight_decay, **adamw)
        return MatrixView(parameter, lambda p: torch.optim.Muon(p, lr=1e-3, weight_decay=weight_decay, **settings))

    return Each(parameters, own)


def stable(parameters, **settings):
    return Each(parameters, lambda p: pytorch_optimizer.StableAdamW([p], lr=1e-3, foreach=False, **settings))


def run(make, shapes, scheduled, dtype=torch.float32):
    parameters = {name: torch.nn.Parameter(first(name, shape).to(dtype)) for name, shape in shapes.items()}
    # Two groups, as adapters with a learning rate of their own for up-projections.
    optimiser = make(list(parameters.values()))
    rates = [group["lr"] for group in optimiser.param_groups]
    for step in range(STEPS):
        for name, parameter in parameters.items():
            given = gradient(name, shapes[name], step)
            parameter.grad = None if given is None else given.to(dtype)
        if scheduled:
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = rate * factor(step)
        optimiser.step()
    return parameters, optimiser


CASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
    "adamw.other": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3, weight_decay=0.01),
    "adamw8bit.other": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "adafactor": lambda p: transformers.Adafactor(p),
    "adafactor.warmup": lambda p: transformers.Adafactor(p, warmup_init=True, scale_parameter=False),
    "adafactor.rate": lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
    "adafactor.other": lambda p: transformers.Adafactor(
        p, lr=1e-2, relative_step=False, beta1=0.9, weight_decay=0.1, clip_threshold=0.5, decay_rate=-0.6
    ),
    "lion": lambda p: lion_pytorch.Lion(p, lr=1e-4),
    "lion.other": lambda p: lion_pytorch.Lion(p, lr=1e-4, betas=(0.95, 0.98), weight_decay=0.1),
    "prodigy": lambda p: prodigyopt.Prodigy(p),
    "prodigy.usual": lambda p: prodigyopt.Prodigy(
        p, d_coef=2.0, use_bias_correction=True, safeguard_warmup=True, weight_decay=0.01, d0=1e-4
    ),
    "prodigy.other": lambda p: prodigyopt.Prodigy(
        p, lr=0.5, betas=(0.8, 0.99), beta3=0.9, weight_decay=0.1, decouple=False, growth_rate=1.2, slice_p=3
    ),
    "schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-3),
    "schedulefree.other": lambda p: schedulefree.AdamWScheduleFree(
        p, lr=1e-3, betas=(0.95, 0.99), eps=1e-6, weight_decay=0.1, warmup_steps=5, r=0.5, weight_lr_power=1.0
    ),
    "came": lambda p: came_pytorch.CAME(p, lr=1e-3),
    "came.other": lambda p: came_pytorch.CAME(
        p, lr=1e-3, betas=(0.8, 0.95, 0.99), eps=(1e-20, 1e-12), clip_threshold=0.5, weight_decay=0.1
    ),
    "stableadamw": lambda p: stable(p),
    "stableadamw.other": lambda p: stable(p, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "muon": lambda p: muon(p, adjust_lr_fn="match_rms_adamw"),
    "muon.other": lambda p: muon(
        p, weight_decay=0.1, momentum=0.8, nesterov=False, ns_steps=3, adamw={"betas": (0.8, 0.95), "eps": 1e-4}
    ),
}


def main():
    exact_quantiser()
    made = {}
    for case, make in CASES.items():
        shapes = LARGE if case.startswith("adamw8bit") else SMALL
        # Adafactor with relative steps has no learning rate to schedule.
        scheduled = case not in ("adafactor", "adafactor.warmup")

        def started(parameters):
            optimiser = make(parameters)
            if case.startswith("schedulefree"):
                optimiser.train()
            return optimiser

        parameters, optimiser = run(started, shapes, scheduled)
        for name, parameter in parameters.items():
            made[f"{case}.{name}"] = parameter.clone()
            state = optimiser.state[parameter]
            if "absmax1" in state:
                # Codes are held as numbers in 32 bits: the file's writer has no smaller kind here.
                made[f"{case}.{name}.mean"] = state["state1"].long()
                made[f"{case}.{name}.square"] = state["state2"].long()
                made[f"{case}.{name}.mean_largest"] = state["absmax1"]
                made[f"{case}.{name}.square_largest"] = state["absmax2"]
        if case.startswith("schedulefree"):
            optimiser.eval()
            for name, parameter in parameters.items():
                made[f"{case}.{name}.evaluation"] = parameter
        if case.startswith("prodigy"):
            made[f"{case}.d.losses"] = torch.tensor(optimiser.param_groups[0]["d"], dtype=torch.float64)
        if not case.startswith("adamw8bit"):
            wide, _ = run(started, shapes, scheduled, torch.float64)
            worst = {
                name: (parameters_of(made, case, name) - wide[name]).norm() / (wide[name] - first(name, shapes[name])).norm()
                for name in shapes
            }
            name = max(worst, key=worst.get)
            print(f"  {case}: float64 moves it by {worst[name]:.1e} of the way taken, most in {name}", file=sys.stderr)
    files.write("optimisers.safetensors", made)


def parameters_of(made, case, name):
    return made[f"{case}.{name}"].detach().double()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
