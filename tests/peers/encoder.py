"""Known answers for the encoder classifier, made by transformers, peft and torch.

    python -m venv VENV && VENV/bin/pip install numpy torch transformers peft safetensors
    VENV/bin/python tests/peers/encoder.py --minilm FOLDER

Run by hand; FOLDER is all-MiniLM-L6-v2 as `tests/run` fetches it. Writes, under model/data/reference/:

- tiny_bert/: a random BERT (hidden 32, 2 layers, some 200 tokens) with a pooler, as transformers saves it;
- tiny_bert_peft/: LoRA on all six projections and a head for it, as peft saves them;
- encoder.json: token ids of a few hundred strings under both vocabularies; of the tiny model hidden states, logits,
  losses and gradients for each way of pooling; sentence embeddings of MiniLM (mean of the last rows, not normalized).

`--check FOLDER` instead loads a PEFT folder that this project wrote for the tiny model and prints the largest
difference to the logits in encoder.json.
"""

import argparse
import gzip
import json
import pathlib
import random
import sys

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

ROOT = pathlib.Path(__file__).parents[2]
OUT = ROOT / "model/data/reference"
SPEECHES = ROOT / "sim/data/shakespeare_roles_cap400.jsonl.gz"
LABELS = ["hamlet", "macbeth", "othello"]
TARGETS = r"bert\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
TEXTS = [
    ("My lord, the king is mad.", 0),
    ("Is this a dagger which I see before me, the handle toward my hand?", 1),
    ("The Moor!", 2),
    ("Good night, sweet prince", 0),
    ("", 1),
    ("o, beware, my lord, of jealousy; it is the green-eyed monster which doth mock the meat it feeds on", 2),
]
SENTENCES = [
    "To be, or not to be, that is the question.",
    "Whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune",
    "Federated learning keeps the data where it is.",
    "Ünïcode, 東京 and emoji 🙂 in one line.",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 12,
]
WORDS = """the and of to a my in you is that not me it with be your his this he for but have thou him as will so her
what all thy our lord king by shall if no are we do thee on good now sir from they come or let her here would more was
man well love their she am there how then when enter go upon like one make were may know say""".split()
UNUSUAL = [
    "", " ", "\t\n\r", "a\tb\nc\rd", "naïve café Ångström", "ÀÉÎÕÜ àéîõü", "e\u0301 e\u0300 o\u0308", "ß ẞ ﬁ ﬀ",
    "İstanbul ıI", "東京タワー", "中文 and 英文", "한국어 텍스트", "日本語テキスト", "Русский текст Ёё", "ελληνικά ΆΈ", "עברית",
    "العربية", "हिन्दी", "ไทย", "🙂👍🏽👩‍👩‍👧", "a\u200bb\u200cc\ufeffd", "a\u00a0b\u2003c\u3000d", "a\u0000b\u0001c\u007fd",
    "\ufffd x \ufffd", "soft\u00adhyphen", "[CLS] [SEP] [MASK] [PAD] [UNK]", "[cls]x[SEP]", "##ing", "## ing", "un##able",
    "don't can't won't it's", "rock-'n'-roll", "a.b,c;d:e!f?g", "(x) {y} [z] <w>", "$5.00 £6 €7 ¥8", "50% @user #tag &co",
    "a_b-c+d=e*f/g\\h|i~j`k^l", "“quoted” ‘single’ «guillemets»", "en–dash em—dash", "…ellipsis… ·dot·", "1234567890",
    "3.14159 1,000,000 1e-5", "x" * 99, "x" * 100, "x" * 101, "é" * 100, "é" * 101, "ab" * 60 + " ok", "A" * 50 + " " + "b" * 150,
    "http://example.org/a?b=c&d=e#f", "user@example.org", "C:\\path\\file.txt", "fn main() { println!(\"{}\", 1); }",
    "CamelCase snake_case kebab-case", "ALL CAPS TEXT", "MiXeD cAsE", "a  b   c    d", "  leading", "trailing  ",
    "H₂O x² ½ ⅓ Ⅳ ①", "ﷺ ﷽", "Ǆ ǅ ǆ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𠀀𠀁 CJK extension", "\u0300\u0301", "\U000e0001tag", "a\u2028b\u2029c",
    "﹏﹐﹑", "、。〈〉", "¿qué? ¡sí!", "§ ¶ † ‡ •", "© ® ™", "− × ÷ ±", "→ ← ↑ ↓", "\u1680ogham", "zero\u2060width",
]


def strings():
    chosen = list(UNUSUAL)
    with gzip.open(SPEECHES, "rt", encoding="utf-8") as file:
        users = [json.loads(line) for line in file]
    draw = random.Random(7)
    chosen += [draw.choice(draw.choice(users)["train"])[:160] for _ in range(120)]
    pools = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x4EFF)]
    for _ in range(110):
        characters = []
        for _ in range(draw.randrange(1, 30)):
            low, high = draw.choice(pools + [(0x20, 0x7E)] * 5)
            characters.append(chr(draw.randint(low, high)))
        chosen.append("".join(characters))
    return chosen


def vocabulary():
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += list("!\"'(),-.:;?[]0123456789") + list(letters)
    tokens += ["##" + c for c in letters] + ["##" + s for s in ("er", "ing", "ed", "ly", "th", "s", "ue")]
    return list(dict.fromkeys(tokens + [word for word in WORDS if len(word) > 1]))


def tiny():
    folder = OUT / "tiny_bert"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            near_one = "LayerNorm.weight" in name
            values.copy_(torch.randn_like(values) * (0.2 if values.dim() == 2 else 0.1) + float(near_one))
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}\n')
    return folder, BertTokenizer.from_pretrained(folder)


def ids_of(tokenizer, texts):
    """Control tokens in a text are cut like any word."""
    return [tokenizer(text, split_special_tokens=True, truncation=False, padding=False)["input_ids"] for text in texts]


def classifier(folder, **changes):
    config = BertConfig.from_pretrained(folder, num_labels=len(LABELS), **changes)
    return BertForSequenceClassification.from_pretrained(folder, config=config, attn_implementation="eager").eval()


def adapted(folder):
    torch.manual_seed(5)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(classifier(folder), config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.requires_grad:
                values.copy_(torch.randn_like(values) * 0.2)
    model.save_pretrained(OUT / "tiny_bert_peft")
    (OUT / "tiny_bert_peft/README.md").unlink(missing_ok=True)
    settings = OUT / "tiny_bert_peft/adapter_config.json"
    settings.write_text(settings.read_text().replace(json.dumps(str(folder)), '"tiny_bert"'))
    return model


def features(model, pooling, ids):
    bert = model.base_model.model.bert
    out = bert(input_ids=torch.tensor([ids]))
    if pooling == "pooler":
        return out.pooler_output[0]
    hidden = out.last_hidden_state[0]
    return hidden.mean(dim=0) if pooling == "mean" else hidden[0]


def answers(model, pooling, ids, labels):
    """Each text by itself, without padding; their losses are averaged."""
    model.zero_grad()
    head = model.base_model.model.classifier
    logits = torch.stack([head(features(model, pooling, one)) for one in ids])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    loss.backward()
    gradients = {}
    for name, values in model.named_parameters():
        if values.requires_grad:
            name = name.replace(".default", "").replace("modules_to_save.", "")
            gradients[name] = [float(f"{x:.7g}") for x in values.grad.flatten().tolist()]
    if pooling == "pooler":
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in ids], batch_first=True)
        whole = model(input_ids=padded, attention_mask=mask).logits
        assert torch.allclose(whole, logits, atol=1e-5), "the model's own forward pass, padded, says the same"
    return {"logits": logits.detach().tolist(), "loss": loss.item(), "gradients": gradients}


def short(values):
    return [[float(f"{x:.7g}") for x in row] for row in values]


def make(minilm):
    folder, tokenizer = tiny()
    texts, labels = [text for text, _ in TEXTS], [label for _, label in TEXTS]
    ids = ids_of(tokenizer, texts)
    model = adapted(folder)
    plain, other = BertModel.from_pretrained(folder).eval(), BertModel.from_pretrained(folder, hidden_act="gelu_new").eval()
    large_tokenizer, large = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    some = strings()
    with torch.no_grad():
        hidden = [plain(input_ids=torch.tensor([one])).last_hidden_state[0].tolist() for one in ids]
        hidden_tanh = other(input_ids=torch.tensor([ids[1]])).last_hidden_state[0].tolist()
        pooled = [plain(input_ids=torch.tensor([one])).pooler_output[0].tolist() for one in ids]
        sentence_ids = [one[:255] + one[-1:] if len(one) > 256 else one for one in ids_of(large_tokenizer, SENTENCES)]
        embeddings = [large(input_ids=torch.tensor([one])).last_hidden_state[0].mean(0).tolist() for one in sentence_ids]
    known = {
        "strings": [{"text": text, "tiny": a, "minilm": b}
                    for text, a, b in zip(some, ids_of(tokenizer, some), ids_of(large_tokenizer, some))],
        "labels": LABELS, "texts": texts, "classes": labels, "ids": ids,
        "hidden": [short(rows) for rows in hidden], "hidden_tanh_1": short(hidden_tanh), "pooled": short(pooled),
        "adapted": {pooling: answers(model, pooling, ids, labels) for pooling in ("pooler", "cls", "mean")},
        "minilm": [{"text": text, "ids": one, "embedding": [float(f"{x:.6g}") for x in values]}
                   for text, one, values in zip(SENTENCES, sentence_ids, embeddings)],
    }  # fmt: skip
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in known.items())
    (OUT / "encoder.json").write_text("{" + rows + "}\n")
    print(f"{len(some)} strings, {len(known['adapted']['pooler']['gradients'])} gradients")


def check(folder):
    known = json.loads((OUT / "encoder.json").read_text())
    model = PeftModel.from_pretrained(classifier(OUT / "tiny_bert"), folder).eval()
    with torch.no_grad():
        logits = torch.stack([model(input_ids=torch.tensor([one])).logits[0] for one in known["ids"]])
    worst = (logits - torch.tensor(known["adapted"]["pooler"]["logits"])).abs().max().item()
    print(f"peft reading {folder}: largest difference of a logit {worst:.2e}")
    sys.exit(worst > 1e-4)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minilm", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    make(arguments.minilm)


main()
