"""The encoder classifier against torch + peft: which of four plays says this line, on MiniLM.

    python -m venv VENV && VENV/bin/pip install numpy torch transformers peft safetensors
    cargo build --release -p fleetune-sim
    OMP_NUM_THREADS=1 VENV/bin/python tests/peers/classify.py --sim target/release/fleetune-sim --minilm FOLDER

Run by hand; FOLDER is all-MiniLM-L6-v2 as `tests/run` fetches it. The lines are speeches of this repository's own
data, as many of each play; a role's last speeches are the test. Both sides train the head alone, and the head with
LoRA (rank 8, alpha 16, query and value), with the same batch size, optimizer, schedule, clipping, pooling and number
of steps, from first values and orders of lines of their own, three seeds each. Neither drops values out. CPU seconds
a step are of the whole process's training loop, one thread, the median of the runs. `--data OUT` only writes the
lines.
"""

import argparse
import gzip
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
SPEECHES = ROOT / "sim/data/shakespeare_roles_cap400.jsonl.gz"
PLAYS = ["othello", "much-ado-about-nothing", "coriolanus", "the-merry-wives-of-windsor"]
WORDS_MIN = 8
TRAINED, TESTED = 360, 75
BATCH, RATE, LENGTH = 16, 2e-3, 64


def lines():
    with gzip.open(SPEECHES, "rt", encoding="utf-8") as file:
        users = [json.loads(line) for line in file]
    draw = random.Random(1)
    splits = {"train": [], "test": []}
    for play in PLAYS:
        for split, names, count in (("train", ["train"], TRAINED), ("test", ["test", "val"], TESTED)):
            speeches = [text for user in users if user["user"].startswith(play + "/") for name in names for text in user[name]]
            speeches = [text for text in speeches if len(text.split()) >= WORDS_MIN]
            draw.shuffle(speeches)
            assert len(speeches) >= count, (play, split, len(speeches))
            splits[split] += [{"text": text, "label": play} for text in speeches[:count]]
    for split in splits.values():
        draw.shuffle(split)
    return splits


def write(splits, folder):
    for name, split in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in split))


def ours(sim, minilm, folder, lora, epochs, seed, extra=()):
    out = folder / f"{time.monotonic_ns()}.safetensors"
    command = [sim, "classify", "train", "--model", minilm, "--data", folder / "train.jsonl", "--eval", folder / "test.jsonl",
               "--out", out, "--targets", "query,value" if lora else "none", "--rank", 8, "--alpha", 16, "--epochs", epochs,
               "--batch", BATCH, "--learning-rate", RATE, "--length-max", LENGTH, "--seed", seed, "--json", *extra]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["eval"]["accuracy"], found["eval"]["nll"], found["cpu_s_per_step"]


def peer(minilm, splits, lora, epochs, seed):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    encoder = AutoModel.from_pretrained(minilm, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    head = torch.nn.Linear(encoder.config.hidden_size, len(PLAYS))
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    if lora:
        encoder = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    else:
        encoder.requires_grad_(False)

    def logits(texts):
        given = tokenizer(texts, padding="longest", truncation=True, max_length=LENGTH, return_tensors="pt")
        rows = encoder(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1).float()
        return head((rows * mask).sum(1) / mask.sum(1))

    trained = [p for p in list(encoder.parameters()) + list(head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    steps = epochs * math.ceil(len(splits["train"]) / BATCH)
    warmup = math.ceil(steps / 10)
    order, draw = [], random.Random(seed)
    started = time.process_time()
    for step in range(steps):
        batch = []
        while len(batch) < BATCH:
            if not order:
                order = list(splits["train"])
                draw.shuffle(order)
            batch.append(order.pop())
        share = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        optimizer.param_groups[0]["lr"] = RATE * share
        classes = torch.tensor([PLAYS.index(line["label"]) for line in batch])
        loss = torch.nn.functional.cross_entropy(logits([line["text"] for line in batch]), classes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    seconds = (time.process_time() - started) / steps
    with torch.no_grad():
        parts = [splits["test"][i : i + 50] for i in range(0, len(splits["test"]), 50)]
        all_logits = torch.cat([logits([line["text"] for line in part]) for part in parts])
    classes = torch.tensor([PLAYS.index(line["label"]) for line in splits["test"]])
    accuracy = (all_logits.argmax(1) == classes).float().mean().item()
    return accuracy, torch.nn.functional.cross_entropy(all_logits, classes).item(), seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sim", type=pathlib.Path)
    parser.add_argument("--minilm", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", choices=["head", "lora"])
    arguments = parser.parse_args()
    splits = lines()
    if arguments.data:
        arguments.data.mkdir(parents=True, exist_ok=True)
        return write(splits, arguments.data)
    assert os.environ.get("OMP_NUM_THREADS") == "1", "set OMP_NUM_THREADS=1"
    print(f"{len(splits['train'])} lines to train on, {len(splits['test'])} to test on, {1 / len(PLAYS):.0%} by guessing")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write(splits, folder)
        epochs = arguments.epochs
        for lora in {"head": [False], "lora": [True]}.get(arguments.only, [False, True]):
            what = "head and LoRA" if lora else "head alone"
            rows = [(name, run) for name, run in (
                ("fleetune", lambda seed: ours(arguments.sim, arguments.minilm, folder, lora, epochs, seed)),
                ("fleetune, bf16 products", lambda seed: ours(arguments.sim, arguments.minilm, folder, lora, epochs, seed, ["--precision", "bf16"])),
                ("torch", lambda seed: peer(arguments.minilm, splits, lora, epochs, seed)),
            )]  # fmt: skip
            found = {name: [] for name, _ in rows}
            for seed in range(arguments.seeds):
                for name, run in rows:
                    found[name].append(run(seed))
            for name, figures in found.items():
                accuracy, nll, seconds = (list(column) for column in zip(*figures))
                each = " ".join(f"{100 * x:.1f}" for x in accuracy)
                print(f"{what:14} {name:24} accuracy {100 * statistics.mean(accuracy):.1f} % ({each}), "
                      f"{statistics.mean(nll):.3f} nats, {statistics.median(seconds):.3f} CPU s a step", flush=True)  # fmt: skip


main()
