//! The shipped scenarios, and complaints that name the setting.

use super::*;

#[test]
fn the_shipped_scenarios_are_sound() {
    Scenario::default_fleet().unwrap();
    let reference = Scenario::smollm2().unwrap();
    assert_eq!((reference.fleet.cohort, reference.rounds, reference.devices.dropout), (8, 16, 0.0));
    let private = Scenario::default_fleet().unwrap().made_private().unwrap();
    assert!(private.privacy.enabled && private.adapter.freeze_a && private.privacy.noise_cohort == 1000);
    let better = include_str!("../../scenarios/smollm2_private.toml");
    let better = Scenario::from_toml("scenarios/smollm2_private.toml", better).unwrap();
    let (z, reference) = (better.imagined().unwrap().unwrap(), private.imagined().unwrap().unwrap());
    assert_eq!((z.cohort, z.delta, better.privacy.epsilon), (reference.cohort, reference.delta, 2.0));
    let further = include_str!("../../scenarios/next_word_pretrained.toml");
    let further = Scenario::from_toml("scenarios/next_word_pretrained.toml", further).unwrap();
    assert!(further.trained(1).unwrap() == TrainedConfig::Full && !further.model.fresh);
}

#[test]
fn errors_name_the_setting() {
    let check = |text: &str, expected: &str| {
        let error = format!("{:#}", Scenario::from_toml("x.toml", text).unwrap_err());
        assert!(error.contains("x.toml") && error.contains(expected), "{error}");
    };
    check("round = 3", "unknown field `round`");
    check("[fleet]\ncohort = 4\nreports_min = 5", "fleet.reports_min");
    check("[server]\noptimizer = \"adam\"", "server.optimizer");
    check("[aggregation]\nprotocol = \"secagg\"", "aggregation.protocol");
    check("[model]\ntrains = \"head\"", "model.trains");
    check("[adapter]\ntargets = [\"head\"]", "adapter.targets");
    check("[engine]\nprecision = \"f16\"", "engine.precision");
    check("rounds = ", "x.toml");
}
