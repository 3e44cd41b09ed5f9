//! From the bytes of an update to a ring vector that may enter the sum.

use super::error::invalid;
use fleetune_proto::{AggregationPlan, CallFailure, Digest, INLINE_BYTES_MAX, wire};
use fleetune_secagg::RingVector;

/// Unpacks an update and, since the plaintext protocol shows it, holds it to the clipping norm: a device
/// that does not clip is refused, and no sum can wrap around the ring.
pub(super) fn read_update(
    plan: &AggregationPlan,
    dimension: usize,
    bytes: &[u8],
) -> Result<RingVector, CallFailure> {
    let vector = RingVector::unpack(plan.ring_bits, dimension, bytes).map_err(|error| invalid(&error))?;
    let norm = norm(plan, &vector.to_signed());
    let bound = norm_max(plan, dimension);
    if norm > bound {
        let clipping_norm = plan.clipping_norm.value();
        return Err(invalid(&format!("update: its norm is {norm:.4e}; the plan clips to {clipping_norm}")));
    }
    Ok(vector)
}

/// The address of the bytes that are submitted; `field` is named in the error.
pub(super) fn submitted_digest(
    field: &'static str,
    source: Option<&wire::resource::Source>,
) -> Result<Digest, CallFailure> {
    match source {
        Some(wire::resource::Source::Inline(bytes)) if bytes.len() > INLINE_BYTES_MAX => {
            Err(invalid(&format!("{field}: {} bytes inline; at most {INLINE_BYTES_MAX}", bytes.len())))
        }
        Some(wire::resource::Source::Inline(bytes)) => Ok(Digest::of(bytes)),
        Some(wire::resource::Source::Blob(digest)) => {
            Digest::parse(field, Some(digest.clone())).map_err(|error| invalid(&error))
        }
        None => Err(invalid(&format!("{field}: missing"))),
    }
}

/// The clipping norm, and what rounding `dimension` values to the grid can add to it.
fn norm_max(plan: &AggregationPlan, dimension: usize) -> f64 {
    let half_step = 0.5 * norm(plan, &[1]);
    f64::from(plan.clipping_norm.value()) * (1.0 + 1e-5) + half_step * (dimension as f64).sqrt()
}

fn norm(plan: &AggregationPlan, values: &[i32]) -> f64 {
    let decoded = plan.fixed_point().decode_mean(values, 1).expect("one is a valid number of contributions");
    l2_norm(&decoded)
}

/// The L2 norm, added up in f64.
pub(super) fn l2_norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleetune_privacy::{ClippingNorm, clip};
    use fleetune_proto::{AggregationProtocol, FailureKind};
    use fleetune_secagg::RingBits;

    fn plan(ring_bits: u32) -> AggregationPlan {
        AggregationPlan {
            protocol: AggregationProtocol::InsecurePlaintext,
            clipping_norm: ClippingNorm::new(1.0).unwrap(),
            ring_bits: RingBits::new(ring_bits).unwrap(),
            summands_max: 16,
            summands_min: 2,
            privacy: None,
            secure: None,
        }
    }

    #[test]
    fn an_honest_update_at_the_norm_passes_on_the_coarsest_grid() {
        for bits in [12, 16, 32] {
            let plan = plan(bits);
            let clipped = clip(vec![0.7; 10_000], plan.clipping_norm).unwrap();
            let encoded = plan.fixed_point().encode(&clipped).unwrap();
            let bytes = RingVector::from_signed(plan.ring_bits, encoded.values()).pack();
            assert!(read_update(&plan, 10_000, &bytes).is_ok(), "{bits} bits");
        }
    }

    #[test]
    fn an_update_above_the_norm_or_of_another_length_is_refused() {
        let plan = plan(32);
        let bytes = RingVector::from_signed(plan.ring_bits, &[i32::MAX, 0]).pack();
        let failure = read_update(&plan, 2, &bytes).unwrap_err();
        assert_eq!(failure.kind, FailureKind::InvalidArgument);
        assert!(failure.message.starts_with("update: its norm is 1.6000e1"), "{failure}");
        assert_eq!(read_update(&plan, 3, &bytes).unwrap_err().kind, FailureKind::InvalidArgument);
    }
}
