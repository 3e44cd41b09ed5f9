//! The devices that a generic trainer can be given by name. Any other [`Device`] of burn's will do as well.

use burn::tensor::Device;

#[cfg(feature = "wgpu")]
use super::GenericError;

/// The processor, by burn's own CPU backend; always there.
#[must_use]
pub fn flex() -> Device {
    Device::flex()
}

/// The graphics device that wgpu likes best, or the one that `CUBECL_WGPU_DEFAULT_DEVICE` names; started at the first
/// call, the same one at every further.
///
/// # Errors
/// [`GenericError::NoDevice`] with wgpu's reason.
#[cfg(feature = "wgpu")]
pub fn wgpu() -> Result<Device, GenericError> {
    static STARTED: std::sync::OnceLock<Result<Device, GenericError>> = std::sync::OnceLock::new();
    let start = || {
        let refused = |e| GenericError::NoDevice { backend: "wgpu", reason: format!("{e}") };
        Device::wgpu_options().init().map_err(refused)
    };
    STARTED.get_or_init(start).clone()
}
