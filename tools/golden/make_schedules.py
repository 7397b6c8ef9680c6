"""Factors on the learning rate by transformers' schedules, for crates/lora-train/src/schedule.rs.

python tools/golden/make_schedules.py crates/lora-train/tests/golden/schedules.json
"""

import json
import sys

import torch
import transformers

STEPS = 40
WARMUP = 8
# Our name and options; transformers' name, arguments and what its training arguments give beside.
CASES = [
    ("linear", {}, "linear", {}),
    ("cosine", {}, "cosine", {}),
    ("cosine", {"lr_min_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_restarts", {"lr_scheduler_num_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"lr_scheduler_power": 2.0, "lr_min_ratio": 0.01}, "polynomial", {"power": 2.0, "lr_end": 0.01}),
    ("inverse_sqrt", {}, "inverse_sqrt", {}),
    ("cosine", {"lr_decay_steps": 12}, "warmup_stable_decay", {"num_decay_steps": 12}),
    # Of a least rate transformers' warmup_stable_decay begins its warm-up there, too; ours begins at 0, as its others do.
    ("linear", {"lr_decay_steps": 12}, "warmup_stable_decay", {"num_decay_steps": 12, "decay_type": "linear"}),
]


def factors(name, arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS, scheduler_specific_kwargs=arguments
    )
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


cases = [
    {"name": ours, "options": options, "factors": [round(rate, 12) for rate in factors(theirs, arguments)]}
    for ours, options, theirs, arguments in CASES
]
golden = {"transformers": transformers.__version__, "steps": STEPS, "warmup": WARMUP, "cases": cases}
with open(sys.argv[1], "w") as file:
    json.dump(golden, file, indent=1)
    file.write("\n")
