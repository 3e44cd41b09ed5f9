//! Numeric kernels of the decoder over plain f32 slices: no burn types, no threads, no I/O.
//!
//! Every kernel runs on the calling thread and gives the same bits each time it is called with the same
//! inputs on the same machine, whatever other threads do. Row-major throughout. `ops.rs` turns the layer
//! and head kernels into burn operations; `decoder.rs` calls them directly for inference.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod cross_entropy;
pub(crate) mod extras;
pub(crate) mod head;
pub(crate) mod int8;
pub(crate) mod kept;
pub(crate) mod layer;
pub(crate) mod layer_backward;
pub(crate) mod linear;
pub(crate) mod matrix;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod single;
