//! A coordinator or peers that lie, against the real device and the real coordinator.
