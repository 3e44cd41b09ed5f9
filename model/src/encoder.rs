//! Text classification with an encoder of the BERT family (MiniLM): a frozen [`EncoderModel`], LoRA beside its
//! projections, and a head that is trained fully.
//!
//! What is trained is one flat vector that a [`ClassifierLayout`] gives its meaning, so averaging, clipping and
//! secure aggregation take it as they take an adapter's. Reading models is in `hugging_face.rs` and `gguf.rs`,
//! the passes in `pass.rs` and `layer.rs`, gradients in `trainer.rs`, the local loop in `local.rs`.
//!
//! The passes call the kernels directly, forward and then backward, without burn: the order is fixed, nothing
//! branches, and a tape would only hold what [`layer`]'s `Kept` holds. Batches are never padded: the rows of all
//! sequences stand one behind another, and only attention and pooling know where one ends. So no mask is needed,
//! and no time goes into rows that are thrown away.

mod attention;
mod checkpoint;
mod config;
mod gelu;
mod gguf;
mod hugging_face;
mod layer;
mod layer_norm;
mod layout;
mod local;
mod model;
mod pass;
mod peft;
mod tokenizer;
mod trainer;

pub use checkpoint::Classifier;
pub use config::{Activation, EncoderConfig, EncoderProjection, Pooling};
pub use layout::{ClassifierConfig, ClassifierLayout, EncoderLora, LayoutEntry, Part};
pub use local::fine_tune;
pub use model::{EncoderLayer, EncoderModel, EncoderParts, LayerNormWeights, LinearWeights};
pub use peft::{ClassifierPeft, from_peft, read_peft_dir, to_peft, write_peft_dir};
pub use tokenizer::{WordPieceSettings, WordPieceTokenizer};
pub use trainer::{ClassifierTrainer, Example};

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod known;
