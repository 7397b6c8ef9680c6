"""Losses of preference pairs as TRL computes them: DPO with the base as reference, and ORPO's odds ratio; metrics, the first
step's gradients, and twenty losses of AdamW on all pairs at once.

usage: preference.py BASE ADAPTER OUT

BASE is a folder with a tiny model and its tokenizer, ADAPTER PEFT's folder to begin with; OUT has `pairs.jsonl`, and gets
`expected.json` and `gradients.safetensors`. Needs trl beside what `requirements.txt` names.

Learned are the last answers with the token that ends them, which TRL is told as its `completion_mask`. ORPO's loss of the
better answer is the paper's (arXiv 2403.07691): the mean over the tokens of each answer, where TRL takes prompts with it.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOTrainer

BETA, LAMBDA, RATE, DECAY, STEPS = 0.1, 0.3, 1e-3, 0.01, 20
ANSWER = "{{ message['content'] + '<|im_end|>' }}"
# The steps whose metrics are kept: accuracies jump where margins are near 0.
TOLD = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"]


def batch_of(tokenizer, pairs):
    """Better answers before worse ones, filled up on the right."""
    head, tail = tokenizer.chat_template.split(ANSWER, 1)
    tagged = head + "{% generation %}" + ANSWER + "{% endgeneration %}" + tail
    rows = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            whole = tokenizer.apply_chat_template(
                pair[side], chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
            )
            rows.append((whole["input_ids"], whole["assistant_masks"]))
    longest = max(len(ids) for ids, _ in rows)
    shape = (len(rows), longest)
    ids, mask, learned = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for row, (own, answers) in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
        learned[row, : len(own)] = torch.tensor(answers)
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": learned}


def load(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def trainer_of(model, tokenizer, folder):
    one = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    data = Dataset.from_list([{"prompt": one[0], "chosen": one[1], "rejected": one[1]}])
    config = DPOConfig(output_dir=folder, beta=BETA, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False)
    trainer = DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    # Where an adapter is trained on, TRL takes its beginning for the reference; here it is the base.
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    for name, own in trainer.model.named_parameters():
        own.requires_grad_("lora_" in name)
    trainer.model.eval()
    return trainer


def dpo(trainer, batch):
    trainer._metrics["eval"].clear()
    loss = trainer._compute_loss(trainer.model, batch, False)
    return loss, {name: trainer._metrics["eval"][name][-1] for name in TOLD}


class OddsRatio:
    beta = LAMBDA

    class accelerator:
        device = torch.device("cpu")


def orpo(trainer, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen, rejected = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    ratios, first, second, _, _ = ORPOTrainer.odds_ratio_loss(OddsRatio, chosen, rejected)
    told = [first, second, first - second, (first > second).float(), chosen, rejected]
    return (-chosen - ratios).mean(), {name: own.mean().item() for name, own in zip(TOLD, told)}


def main(base, adapter, out):
    torch.set_num_threads(1)
    out = Path(out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    batch = batch_of(tokenizer, pairs)
    expected = {"dpo_beta": BETA, "orpo_lambda": LAMBDA, "learned": int(batch["completion_mask"].sum())}
    gradients = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, objective in (("dpo", dpo), ("orpo", orpo)):
            trainer = trainer_of(load(base, adapter), tokenizer, folder)
            own = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
            optimiser = torch.optim.AdamW(own.values(), lr=RATE, weight_decay=DECAY)
            losses, norms, told = [], [], []
            for step in range(STEPS):
                optimiser.zero_grad()
                loss, metrics = objective(trainer, batch)
                loss.backward()
                if step == 0:
                    short = {n.replace("base_model.model.", "").replace(".default", ""): p.grad for n, p in own.items()}
                    gradients |= {f"{name}.{key}": grad.clone() for key, grad in short.items()}
                norms.append(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in own.values())).item())
                optimiser.step()
                losses.append(loss.item())
                told.append(metrics)
            expected[name] = {"losses": losses, "gradient_norms": norms, "first": told[0], "last": told[-1]}
    save_file(gradients, out / "gradients.safetensors")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
