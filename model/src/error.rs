//! What can go wrong with model files, weights and adapters; training has its own errors beside it.

use std::path::{Path, PathBuf};

/// A base model that could not be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused to read the path.
    #[error("cannot read {}", path.display())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The named file holds what the inner error says.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong inside.
        source: Box<Self>,
    },
    /// The bytes end before what they announce.
    #[error("truncated: {what} needs {needed} bytes at offset {offset}, {available} are left")]
    Truncated {
        /// The part that was being read.
        what: String,
        /// Where it starts, in bytes from the start of the file.
        offset: u64,
        /// How many bytes it takes.
        needed: u64,
        /// How many bytes there are.
        available: u64,
    },
    /// The bytes break a rule of their format.
    #[error("malformed: {what}: {reason}")]
    Malformed {
        /// The key, tensor or part at fault.
        what: String,
        /// The broken rule.
        reason: String,
    },
    /// The model is of a family this crate does not compute.
    #[error("unknown architecture {found:?}: only llama, qwen2, qwen3 and gemma3 are supported")]
    UnknownArchitecture {
        /// The name the file gives.
        found: String,
    },
    /// The model asks for a computation this crate does not do.
    #[error("unsupported: {key} = {found}: {reason}")]
    Unsupported {
        /// The metadata key or field.
        key: String,
        /// Its value.
        found: String,
        /// What would be supported.
        reason: String,
    },
    /// A tensor is stored in a format this crate does not read.
    #[error("tensor {tensor}: unsupported type {found}")]
    UnsupportedTensorType {
        /// The tensor's name.
        tensor: String,
        /// The type's code or name in the file.
        found: String,
    },
    /// A metadata key is not there.
    #[error("missing key {key}")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata key holds a value of another type.
    #[error("key {key}: expected {expected}, found {found}")]
    WrongKeyType {
        /// The key.
        key: String,
        /// The type it must have.
        expected: &'static str,
        /// The type it has.
        found: &'static str,
    },
    /// A tensor is not there.
    #[error("missing tensor {tensor}")]
    MissingTensor {
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor is there that the computation would ignore.
    #[error("unexpected tensor {tensor}: ignoring it would change the model")]
    UnexpectedTensor {
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor's shape contradicts the hyperparameters.
    #[error("tensor {tensor}: wrong shape: expected {expected:?}, found {found:?} (rows, columns)")]
    WrongShape {
        /// The tensor's name.
        tensor: String,
        /// What the hyperparameters ask for.
        expected: Vec<u64>,
        /// What the file says.
        found: Vec<u64>,
    },
    /// A hyperparameter is out of range or contradicts another.
    #[error("hyperparameter {field}: {reason}")]
    Config {
        /// The field of [`crate::config::ModelConfig`].
        field: &'static str,
        /// The broken rule.
        reason: String,
    },
    /// The tokenizer cannot be assembled.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor's values cannot be held.
    #[error("tensor {tensor}: {source}")]
    Weights {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with the values.
        source: WeightError,
    },
}

impl ModelError {
    /// Names the file that the error is about.
    pub(crate) fn in_file(self, path: &Path) -> Self {
        Self::File { path: path.to_owned(), source: Box::new(self) }
    }
}

/// Values that cannot become a [`crate::weights::WeightMatrix`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    /// The number of values or bytes is not that of the shape.
    #[error("a {rows} x {cols} matrix takes {expected} {unit}, {found} were given")]
    Length {
        /// Rows of the shape.
        rows: usize,
        /// Columns of the shape.
        cols: usize,
        /// What it takes.
        expected: usize,
        /// What there is.
        found: usize,
        /// Values or bytes.
        unit: &'static str,
    },
    /// A block format needs rows that are whole blocks.
    #[error("{format} needs a multiple of {block} columns, found {cols}")]
    Columns {
        /// The format's name.
        format: &'static str,
        /// Values in one of its blocks.
        block: usize,
        /// The columns.
        cols: usize,
    },
    /// A value is NaN, infinite, or beyond what the format can hold.
    #[error("value {index} is not finite or does not fit {format}")]
    Value {
        /// Where the value stands.
        index: usize,
        /// The format's name.
        format: &'static str,
    },
    /// The shape is empty or its size overflows.
    #[error("shape {rows} x {cols} is empty or too large")]
    Shape {
        /// Rows of the shape.
        rows: usize,
        /// Columns of the shape.
        cols: usize,
    },
}

/// An adapter that could not be laid out, read or written.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The LoRA settings are out of range.
    #[error("lora {field}: {reason}")]
    Config {
        /// The field of [`crate::adapter::LoraConfig`].
        field: &'static str,
        /// The broken rule.
        reason: String,
    },
    /// The vector is not as long as its layout says.
    #[error("adapter has {found} values, its layout has {expected}")]
    WrongLength {
        /// Values in the layout.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A value is NaN or infinite.
    #[error("adapter value {index} is not finite")]
    NonFinite {
        /// Where it stands in the flat vector.
        index: usize,
    },
    /// The checkpoint belongs to another layout.
    #[error("checkpoint is for layout {found}, expected {expected}")]
    LayoutMismatch {
        /// Hash of the layout at hand.
        expected: String,
        /// Hash in the checkpoint.
        found: String,
    },
    /// The adapter was trained for another base model.
    #[error("adapter is bound to base {found}, this base is {expected}")]
    BaseMismatch {
        /// Hash of the base at hand.
        expected: String,
        /// Hash in the adapter file.
        found: String,
    },
    /// The file breaks a rule of its format or uses a feature that is not supported.
    #[error("adapter file: {what}: {reason}")]
    Malformed {
        /// The field or tensor at fault.
        what: String,
        /// The broken rule.
        reason: String,
    },
    /// The operating system refused to read or write the path.
    #[error("cannot access {}", path.display())]
    Io {
        /// What was to be read or written.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The GGUF container itself is at fault.
    #[error(transparent)]
    Gguf(#[from] ModelError),
}
