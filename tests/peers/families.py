"""Tiny random models of each decoder family, and what transformers, peft, sentencepiece and llama.cpp make of them.

    python -m venv VENV && VENV/bin/pip install torch transformers peft gguf safetensors sentencepiece
    VENV/bin/python tests/peers/families.py make                 # writes model/data/reference/families/
    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36
    LLAMA/bin/python tests/peers/families.py llama               # llama.cpp reads the same files; adds its token ids

Run by hand when a family is added. For each family a folder: `model.gguf` (tensors named and permuted as llama.cpp's
converter does; matrices F16), `config.json` and `tokenizer.json` as transformers writes them, an adapter as peft writes
it, `gradients.safetensors` (of the mean loss by the adapter's values, same names), `expected.json` (ids, likelihood of
each token in f32 without and with the adapter, logits after the last, names and shapes of the tensors) and, for each
kind of tokenizer, `tokens.json` (ids of sample strings: `hf` of transformers where they differ from llama.cpp's).
"""

import json
import math
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "model" / "data" / "reference" / "families"
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]
HIDDEN, LENGTH, RANK, ALPHA = 64, 48, 2, 6
PROJECTIONS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS = """The fleet sails out at dawn and the boats come home at night. We tune the sails, then we tune them again;
the weather there is the weather of the northern sea. In 1984 there were 37 boats, in 2024 there are 412.
Don't say that they're lost: I'll find them, she'd said, we've looked for the others. Those others gather feathers.
  def tune(sails):\n    return [sail * 2 for sail in sails]\n\n\nüber die Brücke, où est l'été? naïve café, señor.
"""


def samples():
    """A few hundred strings: words, numbers, spaces, line ends, other scripts, bytes that no piece holds."""
    rng = random.Random(7)
    words = CORPUS.split() + ["naïve", "café", "日本語", "привет", "🙂", "e\u0301", "1234567", "3.14", "don't", "I'M", "we'Ll",
                              "<s>", "</s>", "<|im_end|>", "<unk>", "\t", "\n", "\r\n", "\n\n\n", "  ", "   ", "x=y+1;", "(a)", "▁",
                              "ſ", "ﬁ", "½", "²", "a\u00a0b", "\u3000", "<0x41>"]
    fixed = ["", " ", "  ", "a", " a", "a ", "\n", "\n\n", " \n", "\n ", "a\n b", "a  b", "a   b", "\t\ta", "aaaaaaa", "ttttt",
             "the", " the", "thethe", "the the the", "THE", "1", "12", " 12", "12 34", "a1b2", "...", "!?!", "\u0000", "\u007f",
             "end.\n\nNext", "tabs\tand\tmore", "Don't, I'll, WE'RE", "e\u0301te\u0301", "🙂🙂", "日本 語", "mixed日本text"]
    made = []
    for _ in range(240):
        parts = [rng.choice(words) for _ in range(rng.randint(1, 7))]
        made.append("".join(part + rng.choice(["", " ", " ", "  ", "\n", ", "]) for part in parts))
    return fixed + made


def configs():
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config
    shared = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=128, attn_implementation="eager", rms_norm_eps=1e-6)
    return {
        "llama": lambda v: LlamaConfig(vocab_size=v, intermediate_size=64, tie_word_embeddings=False,
                                       rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, **shared),
        "qwen2": lambda v: Qwen2Config(vocab_size=v, intermediate_size=64, tie_word_embeddings=True,
                                       rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **shared),
        "qwen3": lambda v: Qwen3Config(vocab_size=v, intermediate_size=64, head_dim=24, tie_word_embeddings=True,
                                       rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **shared),
        # Layers 0 and 1 are local, layer 2 global; the window is shorter than the text.
        "gemma3": lambda v: Gemma3TextConfig(
            vocab_size=v, intermediate_size=64, head_dim=24, query_pre_attn_scalar=24, sliding_window=7,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
            **(shared | dict(num_hidden_layers=3, num_key_value_heads=1))),
    }


def byte_level(vocab_size):
    """A byte-level BPE tokenizer as Qwen's: three control tokens at the end."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                  for text in ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]])
    return tokenizer


def sentence_piece(vocab_size, gemma, scratch):
    """A SentencePiece BPE model with bytes; the converter's rules make a tokenizer.json of it."""
    import sentencepiece
    prefix = str(scratch / "spm")
    (scratch / "corpus.txt").write_text(CORPUS * 4)
    defined = ["\n", "\n\n", "<table>"] if gemma else []
    sentencepiece.SentencePieceTrainer.train(
        input=str(scratch / "corpus.txt"), model_prefix=prefix, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=not gemma,
        pad_id=0 if gemma else -1, eos_id=1 if gemma else 2, bos_id=2 if gemma else 1, unk_id=3 if gemma else 0,
        user_defined_symbols=defined, split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
        required_chars="" )
    return sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")


def spm_json(processor, gemma):
    """tokenizer.json with merges derived from the scores, as transformers' converter derives them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    size = processor.get_piece_size()
    vocab = {processor.id_to_piece(i): i for i in range(size)}
    merges = []
    for piece, rank in vocab.items():
        local = [(piece[:i], piece[i:], processor.get_score(rank)) for i in range(1, len(piece))
                 if piece[:i] in vocab and piece[i:] in vocab]
        merges += sorted(local, key=lambda m: (vocab[m[0]], vocab[m[1]]))
    merges.sort(key=lambda m: (m[2], len(m[0]), len(m[1])), reverse=True)
    tokenizer = Tokenizer(models.BPE(vocab, [(a, b) for a, b, _ in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = replace if gemma else normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
    plain = [i for i in range(size) if gemma and processor.id_to_piece(i) in ("\n", "\n\n", "<table>")]
    tokenizer.add_special_tokens([AddedToken(processor.id_to_piece(i), special=True, normalized=False) for i in special])
    tokenizer.add_tokens([AddedToken(processor.id_to_piece(i), special=False, normalized=False) for i in plain])
    return tokenizer


def randomize(model):
    """Weights large enough for every part to matter, rounded to what the files hold."""
    import torch
    generator = torch.Generator().manual_seed(11)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            value.data = (0.0 if model.config.model_type.startswith("gemma3") else 1.0) + 0.3 * noise
        elif name.endswith("bias"):
            value.data = 0.7 * noise
        else:
            scale = 0.25 if "embed" in name else 0.25 if "mlp" in name or "o_proj" in name else 0.35
            value.data = (scale * noise).half().float()


def permuted(tensor, heads):
    """Rows of q and k as architecture llama stores them."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def add_settings(writer, family, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if family == "gemma3":
        rope = config.rope_parameters["full_attention"]
        writer.add_sliding_window(config.sliding_window)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 3)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_scaling_type(__import__("gguf").RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def add_tensors(writer, family, config, state):
    import numpy as np
    plus = 1.0 if family == "gemma3" else 0.0
    norms = GEMMA_NORMS if family == "gemma3" else NORMS
    half = lambda name: state[name].numpy().astype(np.float16)
    norm = lambda name: (state[name].numpy() + np.float32(plus)).astype(np.float32)
    writer.add_tensor("token_embd.weight", half("model.embed_tokens.weight"))
    writer.add_tensor("output_norm.weight", norm("model.norm.weight"))
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", half("lm_head.weight"))
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for theirs, ours in PROJECTIONS.items():
            weight = half(f"{at}{theirs}.weight")
            if family == "llama" and ours in ("attn_q", "attn_k"):
                weight = permuted(weight, config.num_attention_heads if ours == "attn_q" else config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
            if f"{at}{theirs}.bias" in state:
                writer.add_tensor(f"blk.{layer}.{ours}.bias", state[f"{at}{theirs}.bias"].numpy())
        for theirs, ours in (norms | (HEAD_NORMS if family in ("qwen3", "gemma3") else {})).items():
            writer.add_tensor(f"blk.{layer}.{ours}.weight", norm(f"{at}{theirs}.weight"))


def add_tokenizer(writer, family, tokenizer, processor):
    if processor is None:
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        model = json.loads(tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([token for token, _ in by_id])
        writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in by_id])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        end = tokenizer.token_to_id("<|endoftext|>")
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(tokenizer.token_to_id("<|im_end|>"))
        writer.add_add_bos_token(False)
        return
    size, p = processor.get_piece_size(), processor
    def kind(i):
        if p.is_unknown(i): return 2
        if p.is_control(i): return 3
        if p.is_unused(i): return 5
        if p.is_byte(i): return 6
        return 4 if family == "gemma3" and p.id_to_piece(i) in ("\n", "\n\n", "<table>") else 1
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([p.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([p.get_score(i) for i in range(size)])
    writer.add_token_types([kind(i) for i in range(size)])
    writer.add_bos_token_id(p.bos_id())
    writer.add_eos_token_id(p.eos_id())
    writer.add_unk_token_id(p.unk_id())
    if family == "gemma3":
        writer.add_pad_token_id(p.pad_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(family != "gemma3")


def make(family, scratch):
    import gguf
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    home = FOLDER / family
    home.mkdir(parents=True, exist_ok=True)
    spm = family in ("llama", "gemma3")
    processor = sentence_piece(330, family == "gemma3", scratch) if spm else None
    tokenizer = spm_json(processor, family == "gemma3") if spm else byte_level(320)
    (home / "tokenizer.json").write_text(tokenizer.to_str() + "\n")
    config = configs()[family](tokenizer.get_vocab_size())
    if spm:
        config.bos_token_id, config.eos_token_id = processor.bos_id(), processor.eos_id()
    else:
        config.bos_token_id, config.eos_token_id = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    config.pad_token_id = processor.pad_id() if family == "gemma3" else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.eval()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # `to_json_file` leaves out what a reader's defaults say; models on hubs are written so.
    model.config.to_json_file(home / "config.json", use_diff=True)

    writer = gguf.GGUFWriter(str(home / "model.gguf"), family)
    writer.add_name(family)
    add_settings(writer, family, config)
    add_tokenizer(writer, family, tokenizer, processor)
    add_tensors(writer, family, config, state)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ids = [random.Random(5).randrange(config.vocab_size) for _ in range(LENGTH)]
    ids = [(7 * i * i + 13 * i + ids[i % 9]) % config.vocab_size for i in range(LENGTH)]
    inputs = torch.tensor([ids])

    def likelihoods(model):
        logits = model(inputs).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits[:-1], inputs[0, 1:], reduction="none")
        return nll, logits[-1]

    with torch.no_grad():
        nll, last = likelihoods(model)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name.split(".")[1] for name in PROJECTIONS], task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(13)
    trained = {name: value for name, value in peft.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.data = 0.15 * torch.randn(value.shape, generator=generator)
    adapted, _ = likelihoods(peft)
    adapted.mean().float().backward()
    peft.peft_config["default"].base_model_name_or_path = family
    peft.save_pretrained(home)
    (home / "README.md").unlink(missing_ok=True)
    save_file({name.replace(".default", ""): value.grad for name, value in trained.items()}, home / "gradients.safetensors")
    expected = {
        "ids": ids,
        "nll": [round(x, 6) for x in nll.tolist()],
        "last_logits": [round(x, 5) for x in last.tolist()],
        "adapted_nll": [round(x, 6) for x in adapted.tolist()],
        "tensors": {name: list(value.shape) for name, value in state.items()
                    if not (config.tie_word_embeddings and name == "lm_head.weight")},
    }
    (home / "expected.json").write_text(json.dumps(expected) + "\n")
    if family != "qwen3":
        tokens = [{"text": text, "hf": tokenizer.encode(text, add_special_tokens=False).ids} for text in samples()]
        for token in tokens:
            if spm and processor.encode(token["text"]) != token["hf"]:
                token["spm"] = processor.encode(token["text"])
        write_lines(home / "tokens.json", tokens)
    print(family, "mean NLL", nll.mean().item(), "adapted", adapted.mean().item(), "spread of logits", last.std().item())


def llama(family):
    """llama.cpp's likelihoods beside transformers', and its token ids into tokens.json."""
    import llama_cpp
    import numpy as np
    home = FOLDER / family
    model = llama_cpp.Llama(str(home / "model.gguf"), n_ctx=128, n_batch=128, logits_all=True, verbose=False,
                            type_k=0, type_v=0, flash_attn=False, n_threads=1)
    expected = json.loads((home / "expected.json").read_text())
    ids = expected["ids"]
    model.eval(ids)
    logits = np.array(model.scores[:len(ids)], dtype=np.float64)
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    nll = (log_sum - logits[np.arange(len(ids)), np.array(ids[1:] + [0])])[:-1]
    error = np.abs(nll - np.array(expected["nll"]))
    print(family, "llama.cpp: mean NLL", nll.mean(), "largest difference from transformers", error.max())
    if family == "qwen3":
        return
    tokens = json.loads((home / "tokens.json").read_text())
    for token in tokens:
        text = token["text"].encode()
        token["ids"] = model.tokenize(text, add_bos=False, special=True)
        ordinary = model.tokenize(text, add_bos=False, special=False)
        if ordinary != token["ids"]:
            token["ordinary"] = ordinary
        for name in ("hf", "spm"):
            if token.get(name) == token["ids"]:
                del token[name]
    write_lines(home / "tokens.json", tokens)
    for name in ("hf", "spm", "ordinary"):
        print(family, name, "other than llama.cpp's with control tokens:", [t["text"] for t in tokens if name in t])


def write_lines(path, tokens):
    path.write_text("[\n" + ",\n".join(json.dumps(t, ensure_ascii=False, separators=(",", ":")) for t in tokens) + "\n]\n")


def main():
    import tempfile
    for family in sys.argv[2:] or FAMILIES:
        if sys.argv[1] == "llama":
            llama(family)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            make(family, pathlib.Path(scratch))


if __name__ == "__main__":
    main()
