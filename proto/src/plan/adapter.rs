//! What a plan trains, between its typed and its wire form. Plans that do not name a kind train an adapter, and their
//! bytes are those of before there were kinds.

use super::{AdapterPlan, LoraShape, TrainedShape, finite};
use crate::{
    digest::parse_sha256,
    error::{WireError, within},
    limits::{DIMENSION_MAX, FULL_DIMENSION_MAX, RANK_MAX},
    wire,
};

const TARGETS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

pub(super) fn to_wire(plan: &AdapterPlan) -> wire::AdapterPlan {
    let common = wire::AdapterPlan {
        layout_sha256: plan.layout_sha256.to_vec(),
        dimension: plan.dimension as u64,
        ..wire::AdapterPlan::default()
    };
    match &plan.shape {
        TrainedShape::Full => wire::AdapterPlan { kind: wire::TrainedKind::Full.into(), ..common },
        TrainedShape::Lora(lora) => wire::AdapterPlan {
            rank: lora.rank,
            alpha: lora.alpha,
            targets: lora.targets.clone(),
            freeze_a: lora.freeze_a,
            init_seed: lora.init_seed,
            ..common
        },
    }
}

pub(super) fn parse(wire: wire::AdapterPlan) -> Result<AdapterPlan, WireError> {
    let layout_sha256 = parse_sha256("plan.adapter.layout_sha256", &wire.layout_sha256)?;
    let (shape, dimension_max) = match wire::TrainedKind::try_from(wire.kind) {
        Ok(wire::TrainedKind::Unspecified) => (TrainedShape::Lora(parse_lora(&wire)?), DIMENSION_MAX),
        Ok(wire::TrainedKind::Full) => (parse_full(&wire)?, FULL_DIMENSION_MAX),
        Err(_) => {
            return Err(WireError::invalid("plan.adapter.kind", format!("unknown kind {}", wire.kind)));
        }
    };
    let dimension = within("plan.adapter.dimension", wire.dimension, 1..=dimension_max)?;
    let dimension =
        usize::try_from(dimension).map_err(|_| WireError::invalid("plan.adapter.dimension", "too large"))?;
    Ok(AdapterPlan { shape, layout_sha256, dimension })
}

/// A plan that says both is refused: two readers must not read two plans.
fn parse_full(wire: &wire::AdapterPlan) -> Result<TrainedShape, WireError> {
    let none = wire.rank == 0
        && wire.alpha == 0.0
        && wire.targets.is_empty()
        && !wire.freeze_a
        && wire.init_seed == 0;
    if none {
        Ok(TrainedShape::Full)
    } else {
        Err(WireError::invalid(
            "plan.adapter.kind",
            "all weights are trained, and yet an adapter is described",
        ))
    }
}

fn parse_lora(wire: &wire::AdapterPlan) -> Result<LoraShape, WireError> {
    let known = |target: &String| TARGETS.contains(&target.as_str());
    let repeated = (1..wire.targets.len()).any(|i| wire.targets[..i].contains(&wire.targets[i]));
    if wire.targets.is_empty() || repeated || !wire.targets.iter().all(known) {
        let problem = format!("{:?}; some of {TARGETS:?}, none twice", wire.targets);
        return Err(WireError::invalid("plan.adapter.targets", problem));
    }
    Ok(LoraShape {
        rank: within("plan.adapter.rank", wire.rank, 1..=RANK_MAX)?,
        alpha: finite("plan.adapter.alpha", wire.alpha, 1e-6, 1e6)?,
        targets: wire.targets.clone(),
        freeze_a: wire.freeze_a,
        init_seed: wire.init_seed,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{TaskPlan, tests::plan};
    use super::*;
    use prost::Message;

    fn full_plan() -> TaskPlan {
        let mut plan = plan();
        plan.adapter.shape = TrainedShape::Full;
        plan
    }

    fn check(plan: &TaskPlan, spoil: &dyn Fn(&mut wire::AdapterPlan), expected: &str) {
        let mut wire: wire::TaskPlan = Message::decode(&*plan.to_bytes()).unwrap();
        spoil(wire.adapter.as_mut().unwrap());
        let error = TaskPlan::parse(&wire.encode_to_vec()).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn a_full_plan_survives_the_wire() {
        assert_eq!(TaskPlan::parse(&full_plan().to_bytes()).unwrap(), full_plan());
    }

    /// What a coordinator of before there were kinds would have sent: it names its hash, so none of it may change.
    #[test]
    fn a_lora_plan_is_the_bytes_it_was() {
        let adapter = to_wire(&plan().adapter).encode_to_vec();
        let expected =
            "08081500008041".to_owned() + "1a0171" + "1a0176" + "2807" + "3220" + &"03".repeat(32) + "3804";
        assert_eq!(hex::encode(adapter), expected);
    }

    #[test]
    fn hostile_kinds_and_shapes_are_refused() {
        check(&plan(), &|p| p.kind = 2, "plan.adapter.kind: unknown kind 2");
        check(&plan(), &|p| p.kind = -1, "plan.adapter.kind: unknown kind -1");
        check(&plan(), &|p| p.kind = 1, "plan.adapter.kind: all weights are trained");
        check(&plan(), &|p| p.targets = vec!["q".into(), "q".into()], "plan.adapter.targets");
        check(&plan(), &|p| p.targets = vec!["head".into()], "plan.adapter.targets");
        check(&full_plan(), &|p| p.kind = 0, "plan.adapter.targets");
        check(&full_plan(), &|p| p.init_seed = 1, "plan.adapter.kind: all weights are trained");
        check(&full_plan(), &|p| p.alpha = f32::NAN, "plan.adapter.kind: all weights are trained");
        check(&full_plan(), &|p| p.dimension = 0, "plan.adapter.dimension: 0");
        check(&full_plan(), &|p| p.dimension = FULL_DIMENSION_MAX + 1, "plan.adapter.dimension");
        check(&full_plan(), &|p| p.dimension = u64::MAX, "plan.adapter.dimension");
        check(&full_plan(), &|p| p.layout_sha256 = vec![1; 31], "plan.adapter.layout_sha256");
    }
}
