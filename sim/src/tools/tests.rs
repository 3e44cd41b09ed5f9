//! Adapters exported by the program and read back, in both formats.

use super::*;
use crate::experiment::EMBEDDED_BASE;
use fleetune_model::{
    adapter::{AdapterLayout, LoraConfig},
    config::Projection,
};
use std::sync::Arc;
use tempfile::TempDir;

/// A folder with the embedded base as a file, and an adapter for it with every factor at work.
struct Place {
    folder: TempDir,
    base: BaseModel,
    adapter: Adapter,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("base.gguf"), EMBEDDED_BASE).expect("a base");
        let base = BaseModel::from_gguf_bytes(EMBEDDED_BASE).expect("the embedded base");
        let targets = Projection::ALL.to_vec();
        let lora = LoraConfig { rank: 4, alpha: 6.0, targets, freeze_a: false, init_seed: 0 };
        let layout = Arc::new(AdapterLayout::new(&base.config, &lora).expect("a layout"));
        let value = |i: usize| ((i * 7919) % 1009) as f32 / 5045.0 - 0.1;
        let values = (0..layout.len()).map(value).collect();
        let adapter = Adapter::new(layout, values).expect("an adapter");
        let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F32, &Metadata::default()).expect("a file");
        fs::write(folder.path().join("adapter.gguf"), bytes).expect("an adapter file");
        Self { folder, base, adapter }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn export(&self, from: &str, format: &str, to: &str) -> Result<()> {
        export(&ExportArgs {
            model: self.path("base.gguf"),
            adapter: self.path(from),
            format: format.to_owned(),
            out: self.path(to),
        })
    }

    fn refusal(&self, from: &str, format: &str, to: &str) -> String {
        format!("{:#}", self.export(from, format, to).expect_err("a refusal"))
    }

    fn read(&self, name: &str) -> Adapter {
        open_adapter(&self.path(name), &self.base).expect("a readable adapter")
    }
}

#[test]
fn an_exported_adapter_comes_back_as_it_was_in_either_format() {
    let place = Place::new();
    place.export("adapter.gguf", "peft", "peft").expect("GGUF to PEFT");
    place.export("peft", "gguf", "back.gguf").expect("PEFT to GGUF");
    place.export("peft", "peft", "again").expect("PEFT to PEFT");
    for name in ["adapter.gguf", "peft", "back.gguf", "again"] {
        let found = place.read(name);
        assert_eq!(found.values, place.adapter.values, "{name}");
        assert!(found.layout == place.adapter.layout, "{name}");
    }
    let bytes = |name: &str| fs::read(place.path(name)).expect("a file");
    assert_eq!(bytes("adapter.gguf"), bytes("back.gguf"));
    let weights = "adapter_model.safetensors";
    assert_eq!(bytes(&format!("peft/{weights}")), bytes(&format!("again/{weights}")));
}

#[test]
fn an_exported_adapter_changes_the_model_as_before() {
    let place = Place::new();
    place.export("adapter.gguf", "peft", "peft").expect("GGUF to PEFT");
    let ids = place.base.tokenizer.encode_ordinary("My lord, I know not what to say to this.");
    let nlls = |adapter: Option<&Adapter>| token_nlls(&place.base, adapter, &ids).expect("a text");
    assert_eq!(nlls(Some(&place.read("peft"))), nlls(Some(&place.adapter)));
    assert_ne!(nlls(None), nlls(Some(&place.adapter)));
}

#[test]
fn what_cannot_be_exported_is_named() {
    let place = Place::new();
    let check = |message: &str, expected: &str| assert!(message.contains(expected), "{message}");
    check(&place.refusal("adapter.gguf", "onnx", "out"), "--format: \"onnx\"");
    check(&place.refusal("adapter.gguf", "gguf", "adapter.gguf"), "is there already");
    check(&place.refusal("base.gguf", "peft", "out"), "base.gguf");
    check(&place.refusal("nothing.gguf", "peft", "out"), "nothing.gguf");
    assert!(!place.path("out").exists());
}
