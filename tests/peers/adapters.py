"""Models and adapters that cross between this project, transformers + peft, and llama.cpp: the negative
log-likelihood of every token of a paragraph must agree, with each program reading what another wrote.

    python -m venv VENV && VENV/bin/pip install numpy torch transformers peft safetensors gguf llama-cpp-python
    cargo build --release -p fleetune-sim
    VENV/bin/python tests/peers/adapters.py --sim target/release/fleetune-sim --model SmolLM2-135M-Instruct.Q4_1.gguf

Run by hand: the packages are large and llama-cpp-python is built from source. `--trained FILE` adds an adapter that
this project trained on that model. For the embedded base that takes a minute: `fleetune-sim run --out OUT`, then
`--model sim/base/fleetune-base.q8_0.gguf --trained OUT/adapter.gguf`. The script takes about 3 minutes and 4 GB for
SmolLM2 and needs no network. It ends with status 1 if a token differs by more than 1e-4 nats.

What is compared, on the model expanded to f32:
- the base: this project on the GGUF file, on an F32 GGUF file that `gguf` wrote, and on a folder that transformers
  wrote; transformers; llama.cpp on the F32 file;
- the base as llama.cpp quantizes it (Q4_K_M and Q6_K; where rows are no whole blocks it falls back to Q5_0 and Q8_0):
  this project on that file, transformers on the values that `gguf` expands;
- an adapter made by peft (LoRA on the attention, rsLoRA on all seven projections): peft, this project reading
  peft's folder, and llama.cpp reading what this project exports of it as GGUF;
- the same adapter and the trained one exported by this project: peft and llama.cpp reading the exports.
"""

import argparse
import ctypes
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-4
PARAGRAPH = pathlib.Path(__file__).parents[2] / "model/data/reference/smollm2_logits.json"
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = ATTENTION + ["gate_proj", "up_proj", "down_proj"]


class Base:
    """The model of a GGUF file in f32: as arrays, in transformers, as an F32 GGUF file and as a folder."""

    def __init__(self, path, scratch):
        self.reader = gguf.GGUFReader(path)
        self.tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in self.reader.tensors}
        self.f32_gguf, self.folder = scratch / "f32.gguf", scratch / "folder"
        self.write_gguf()
        self.model = self.transformers_model()
        self.model.save_pretrained(self.folder)
        self.write_tokenizer()

    def key(self, name):
        return self.reader.fields[name].contents() if name in self.reader.fields else None

    def write_gguf(self):
        writer = gguf.GGUFWriter(self.f32_gguf, "llama")
        for name, field in self.reader.fields.items():
            if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
        for name, values in self.tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def transformers_model(self):
        heads, kv_heads = self.key("llama.attention.head_count"), self.key("llama.attention.head_count_kv")
        config = LlamaConfig(
            vocab_size=len(self.tensors["token_embd.weight"]), hidden_size=self.key("llama.embedding_length"),
            num_hidden_layers=self.key("llama.block_count"), intermediate_size=self.key("llama.feed_forward_length"),
            num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=self.key("llama.context_length"),
            rope_parameters={"rope_type": "default", "rope_theta": self.key("llama.rope.freq_base")},
            rms_norm_eps=self.key("llama.attention.layer_norm_rms_epsilon"), tie_word_embeddings=True,
            bos_token_id=self.key("tokenizer.ggml.bos_token_id"), eos_token_id=self.key("tokenizer.ggml.eos_token_id"),
            attn_implementation="eager",
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        state = {}
        for name, values in self.tensors.items():
            *layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                values = halves_together(values, heads if part == "attn_q" else kv_heads)
            target = f"model.layers.{layer[1]}.{NAMES[part]}" if layer else TOP[part]
            state[target + ".weight"] = torch.from_numpy(np.array(values, dtype=np.float32))
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
        model.tie_weights()
        return model

    def write_tokenizer(self):
        tokens, kinds = self.key("tokenizer.ggml.tokens"), self.key("tokenizer.ggml.token_type")
        added = [{"id": i, "content": tokens[i], "special": True} for i, kind in enumerate(kinds) if kind == 3]
        cutter = [{"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]  # fmt: skip
        vocabulary = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": self.key("tokenizer.ggml.merges")}  # fmt: skip
        tokenizer = {"added_tokens": added, "model": vocabulary,
                     "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutter}}  # fmt: skip
        (self.folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def halves_together(values, heads):
    """From GGUF's order of rows, where pairs that rotate are neighbours, to Hugging Face's."""
    rows, cols = values.shape
    return values.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


class Sim:
    """This project's program."""

    def __init__(self, program, model, text, scratch):
        self.program, self.blocks = program, scratch / "blocks.json"
        self.ids = json.loads(self.call("tokenize", "--model", model, given=json.dumps(text) + "\n"))[:256]
        self.blocks.write_text(json.dumps({"seen": [{"ids": self.ids}], "heldout": [{"ids": self.ids}]}))

    def call(self, *arguments, given=None):
        done = subprocess.run([self.program, *map(str, arguments)], input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def nll(self, model, adapter=None):
        with_adapter = ["--adapter", adapter] if adapter else []
        out = self.call("eval", "--model", model, "--blocks", self.blocks, "--json", *with_adapter)
        return np.array(json.loads(out)["seen"]["token_nll"][0])

    def export(self, model, adapter, form, out):
        self.call("export", "--model", model, "--adapter", adapter, "--format", form, "--out", out)
        return out


def transformers_nll(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return nll_of(logits.numpy(), ids)


def nll_of(logits, ids):
    most = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - most).sum(axis=1)) + most[:, 0]
    return log_sums - logits[np.arange(len(ids) - 1), ids[1:]]


class LlamaCpp:
    """llama.cpp in f32 throughout: weights, keys and values, no flash attention."""

    def __init__(self, path):
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = 2
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def nll(self, ids, adapter=None):
        self.set_adapter(adapter)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(self.context, batch) == 0
        size = (len(ids) * self.vocabulary,)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), size).astype(np.float64)
        llama_cpp.llama_batch_free(batch)
        return nll_of(logits.reshape(len(ids), -1)[:-1], ids)

    def set_adapter(self, path):
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)()
        if path:
            adapters[0] = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
            assert adapters[0], f"llama.cpp does not load {path}"
        scales = (ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(self.context, adapters, 1 if path else 0, scales) == 0


def peft_adapter(base, folder, targets, rank, alpha, rslora):
    """Writes an adapter that changes much, made by peft alone, and gives the likelihoods under it."""
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=rslora,
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(base.transformers_model(), config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name:
                values.normal_(std=0.08)
    model.save_pretrained(folder)
    return model


def quantized_by_llama_cpp(base, name, path):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), 2
    source = str(base.f32_gguf).encode()
    assert llama_cpp.llama_model_quantize(source, str(path).encode(), ctypes.byref(params)) == 0
    return path


class Report:
    def __init__(self):
        self.worst = 0.0

    def line(self, what, found, expected):
        difference = float(np.abs(found - expected).max())
        self.worst = max(self.worst, difference)
        print(f"{what:62} mean {found.mean():.6f}  most by a token {difference:.2e}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sim", required=True, type=pathlib.Path)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--trained", type=pathlib.Path)
    arguments = parser.parse_args()
    text = json.loads(PARAGRAPH.read_text())["paragraph"]
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        compare(arguments, text, pathlib.Path(scratch), report)
    print(f"largest difference {report.worst:.2e}, allowed {TOLERANCE:.0e}")
    sys.exit(report.worst > TOLERANCE)


def compare(arguments, text, scratch, report):
    base, sim = Base(arguments.model, scratch), Sim(arguments.sim, arguments.model, text, scratch)
    ids = sim.ids
    llama = LlamaCpp(base.f32_gguf)
    plain = transformers_nll(base.model, ids)
    print(f"base, transformers: mean {plain.mean():.6f} over {len(plain)} tokens")
    report.line("base, this project, the GGUF file", sim.nll(arguments.model), plain)
    report.line("base, this project, F32 GGUF by gguf", sim.nll(base.f32_gguf), plain)
    report.line("base, this project, folder by transformers", sim.nll(base.folder), plain)
    report.line("base, llama.cpp, F32 GGUF", llama.nll(ids), plain)

    for name in ("Q4_K_M", "Q6_K"):
        file = quantized_by_llama_cpp(base, name, scratch / f"{name}.gguf")
        (scratch / name).mkdir()
        expanded = Base(file, scratch / name)
        formats = sorted({tensor.tensor_type.name for tensor in expanded.reader.tensors})
        expected = transformers_nll(expanded.model, ids)
        report.line(f"base by llama.cpp in {' '.join(formats)}, this project", sim.nll(file), expected)

    adapters = []
    for name, targets, rank, alpha, rslora in [("attention", ATTENTION, 8, 16, False), ("all, rsLoRA", ALL, 4, 6, True)]:
        folder = scratch / name
        expected = transformers_nll(peft_adapter(base, folder, targets, rank, alpha, rslora), ids)
        moved = np.abs(expected - plain).max()
        print(f"adapter by peft ({name}), peft: mean {expected.mean():.6f}, moves a token by {moved:.2f} at most")
        assert moved > 0.5, "the adapter must matter"
        report.line(f"adapter by peft ({name}), this project", sim.nll(arguments.model, folder), expected)
        adapters.append((f"by peft ({name})", folder, expected))
    if arguments.trained:
        ours = sim.nll(arguments.model, arguments.trained)
        moved = np.abs(ours - plain).max()
        print(f"adapter trained here, this project: mean {ours.mean():.6f}, moves a token by {moved:.2f} at most")
        adapters.append(("trained here", arguments.trained, ours))
    for number, (name, adapter, expected) in enumerate(adapters):
        exported = sim.export(arguments.model, adapter, "gguf", scratch / f"{number}.gguf")
        report.line(f"adapter {name}, exported as GGUF, llama.cpp", llama.nll(ids, exported), expected)
        report.line(f"adapter {name}, exported as GGUF, this project", sim.nll(arguments.model, exported), expected)
        folder = sim.export(arguments.model, adapter, "peft", scratch / f"{number}.peft")
        under_peft = PeftModel.from_pretrained(base.transformers_model(), folder).eval()
        report.line(f"adapter {name}, exported as PEFT, peft", transformers_nll(under_peft, ids), expected)


main()
