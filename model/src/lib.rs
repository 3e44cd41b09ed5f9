//! Base models, adapters, training, inference, quantization and file formats.
//!
//! A [`base::BaseModel`] is opened from a GGUF file or a Hugging Face folder and never changes. An
//! [`adapter::Adapter`] is one flat vector whose [`adapter::AdapterLayout`] says what each value means.
//! Nothing here prints, reads a clock or draws random numbers that no argument seeded.

#[cfg(target_endian = "big")]
compile_error!("weights are used as they lie in the file, which is little-endian");

pub mod config;
pub mod error;
pub mod family;

pub mod bytes;
mod rotary;
pub mod weights;

pub mod gguf;
mod hugging_face;
mod safetensors;
pub mod tokenizer;

pub mod base;

pub mod adapter;
pub mod adapter_formats;

mod kernels;
mod ops;

pub use kernels::simd::{SimdLevel, limit_simd};

pub mod batch;
pub mod chat;
mod decoder;
pub mod encoder;
pub mod eval;
pub mod full;
pub mod generate;
pub mod generic;
pub mod infer;
pub mod optim;
pub mod requantize;
mod stock;
pub mod train;
pub mod trained;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod reference;
