//! The client against a scripted coordinator, in virtual time.

mod script;

use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use fleetune_privacy::clip;
use fleetune_proto::device::TrainOrder;
use fleetune_proto::{FailureKind, Purpose, TaskOffer, wire};
use fleetune_secagg::RingVector;

use super::*;
use crate::data::blocks;
use crate::fixture::{BASE, base, base_bytes, checkpoint, manifest, plan, release_adapter, texts};
use crate::training::LocalTrainer;
use script::{Desk, assignment, no_work, policy, sealed_release};
use wire::TaskResult;

#[expect(clippy::unnecessary_wraps, reason = "conditions may fail; these do not")]
fn always() -> Result<(), String> {
    Ok(())
}

fn anything(_: &TaskOffer) -> bool {
    true
}

fn willing() -> App {
    App::new(|| Ok(texts()), always, anything)
}

#[test]
fn trains_contributes_and_installs_the_release() {
    let (desk, adapter) = (Desk::new(), release_adapter(&base()));
    desk.hold(&adapter);
    desk.answers([policy(), assignment(&plan())]);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.contributions() == 1);
    assert_eq!(desk.submitted(), expected_update(), "the simulator's bytes");

    desk.answer(sealed_release(&manifest(1, &adapter), 1));
    desk.drive(&mut client, |log| log.release_reports().len() == 1);
    assert_eq!(desk.log().release_reports(), [(1, wire::ReleaseState::Active)]);
    assert_eq!(client.open_model().unwrap().unwrap().manifest.version, 1);
    assert_eq!(desk.reads_of(&BASE), 1, "the base is read once");
    let events = client.poll_events();
    assert!(events.contains(&Event::ReleaseActive(1)), "{events:?}");
}

fn expected_update() -> Vec<u8> {
    let plan = plan();
    let order =
        TrainOrder { plan: plan.clone(), round: 2, attempt: 0, checkpoint: Digest::of(&checkpoint()) };
    let blocks = blocks(&base().tokenizer, &texts(), plan.training.block_tokens as usize);
    let mut trainer = LocalTrainer::new(base(), &plan).unwrap();
    let update = trainer.run(&order, &checkpoint(), &blocks, &[3; 32], &mut || false).unwrap();
    let clipped = clip(update.delta, plan.aggregation.clipping_norm).unwrap();
    let encoded = plan.aggregation.fixed_point().encode(&clipped).unwrap();
    RingVector::from_signed(plan.aggregation.ring_bits, encoded.values()).pack()
}

#[test]
fn repeats_the_same_check_in_while_the_coordinator_is_away() {
    let desk = Desk::new();
    desk.fail_next(3, FailureKind::Unavailable);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.check_ins().len() == 4);
    let check_ins = desk.log().check_ins();
    assert!(check_ins.windows(2).all(|pair| pair[0] == pair[1]), "one nonce, one answer");
    assert!(desk.now() > UnixMillis(1000 + 3 * 200), "with time between");
}

#[test]
fn a_broken_download_goes_on_and_a_flipped_bit_is_read_again() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan())]);
    desk.break_reads_after(5);
    desk.flip_a_bit_once();
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.contributions() == 1);
    assert!(desk.reads_of(&BASE) > 2);
    assert_eq!(desk.offsets_of(&BASE)[0], 0);
    assert!(desk.offsets_of(&BASE).is_sorted(), "what was kept is not read again");
}

#[test]
fn a_coordinator_that_sends_other_bytes_gets_no_contribution() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan())]);
    desk.lie_about(&BASE);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.check_ins().len() == 3);
    assert_eq!((desk.log().contributions(), desk.reads_of(&BASE)), (0, 8), "it gives up at the limit");
}

#[test]
fn a_manifest_with_a_bad_signature_is_refused() {
    let (desk, adapter) = (Desk::new(), release_adapter(&base()));
    desk.hold(&adapter);
    desk.answer(sealed_release(&manifest(1, &adapter), 2));
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.check_ins().len() == 2);
    let events = client.poll_events();
    let refused = |e: &Event| matches!(e, Event::Refused(reason) if reason.contains("signed release"));
    assert!(events.iter().any(refused), "{events:?}");
    assert_eq!(client.release_versions(), ReleaseVersions::default());
    assert!(desk.log().release_reports().is_empty());
}

#[test]
fn a_release_that_does_not_open_is_refused_for_good() {
    let (desk, good) = (Desk::new(), release_adapter(&base()));
    let foreign = release_adapter(&BaseModel::from_gguf_bytes(base_bytes(2)).unwrap());
    [&good, &foreign].iter().for_each(|adapter| desk.hold(adapter));
    desk.answers([sealed_release(&manifest(1, &good), 1), sealed_release(&manifest(2, &foreign), 1)]);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.release_reports().len() == 2);
    let (active, rejected) = (wire::ReleaseState::Active, wire::ReleaseState::Rejected);
    assert_eq!(desk.log().release_reports(), [(1, active), (2, rejected)]);
    drop(client);
    desk.answer(sealed_release(&manifest(2, &foreign), 1));
    let mut again = desk.client(willing());
    desk.drive(&mut again, |log| log.check_ins().len() == 4);
    assert_eq!(desk.log().release_reports().len(), 2, "not tried again after a restart");
    assert_eq!(again.open_model().unwrap().unwrap().manifest.version, 1);
}

#[test]
fn a_plan_below_the_floors_is_refused_and_reported() {
    let desk = Desk::new();
    let mut greedy = plan();
    greedy.training.steps = 100_000;
    desk.answers([policy(), assignment(&greedy)]);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.check_ins().len() == 3);
    assert_eq!(desk.log().results(), [TaskResult::PlanRejected]);
    assert_eq!(desk.reads_of(&BASE), 0);
}

#[test]
fn diverging_training_is_reported_and_the_client_goes_on() {
    let desk = Desk::new();
    let values = vec![1e38; plan().adapter.dimension];
    let adapter = fleetune_model::adapter::Adapter { layout: crate::fixture::layout(&base()), values };
    let huge = adapter.to_checkpoint_bytes();
    desk.hold(&huge);
    desk.answers([policy(), script::assignment_from(&plan(), &huge), assignment(&plan())]);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.contributions() == 1);
    assert_eq!(desk.log().results(), [TaskResult::TrainingFailed]);
}

#[test]
fn conditions_that_lapse_in_training_interrupt_it() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan())]);
    desk.keep(&BASE);
    desk.keep(&checkpoint());
    let asked = AtomicU32::new(0);
    // Choosing, before training, then between layers: the battery is unplugged at the third of these.
    let unplugged = move || match asked.fetch_add(1, Ordering::Relaxed) {
        0..4 => Ok(()),
        _ => Err("unplugged".to_owned()),
    };
    let mut client = desk.client(App::new(|| Ok(texts()), unplugged, anything));
    desk.drive(&mut client, |log| log.check_ins().len() == 3);
    assert_eq!(desk.log().results(), [TaskResult::Interrupted]);
    assert!(client.poll_events().contains(&Event::Ended("interrupted: unplugged".into())));
    assert!(desk.log().check_ins()[2].eligible_tasks.is_empty(), "and it offers nothing now");
}

#[test]
fn a_training_beyond_the_budget_is_reported_and_not_tried_again() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan())]);
    let builder = desk.builder().insecure_allow_plaintext_aggregation().memory_budget(1_000_000);
    let mut client = builder.build(desk.transport(), willing()).unwrap();
    desk.drive(&mut client, |log| log.check_ins().len() == 5);
    assert_eq!(desk.log().results(), [TaskResult::PlanRejected]);
    let told = |e: &Event| matches!(e, Event::Ended(reason) if reason.contains("the budget is 1 MB"));
    assert!(client.poll_events().iter().any(told));
    let offered: Vec<bool> = desk.log().check_ins().iter().map(|c| !c.eligible_tasks.is_empty()).collect();
    assert_eq!(offered.iter().filter(|offered| **offered).count(), 1, "{offered:?}");
}

#[test]
fn conditions_that_lapse_in_a_download_interrupt_it() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan())]);
    let asked = AtomicU32::new(0);
    let metered =
        move || if asked.fetch_add(1, Ordering::Relaxed) < 3 { Ok(()) } else { Err("metered".into()) };
    let mut client = desk.client(App::new(|| Ok(texts()), metered, anything));
    desk.drive(&mut client, |log| log.check_ins().len() == 3);
    assert_eq!(desk.log().results(), [TaskResult::Interrupted]);
    assert_eq!(desk.reads_of(&BASE), 1);
}

#[test]
fn consent_decides_what_is_named() {
    let desk = Desk::new();
    desk.answers([policy(), no_work()]);
    let offers = Arc::new(Mutex::new(Vec::new()));
    let asked = Arc::clone(&offers);
    let refuses = move |offer: &TaskOffer| {
        asked.lock().unwrap().push(offer.task.clone());
        false
    };
    let mut client = desk.client(App::new(|| Ok(texts()), always, refuses));
    desk.drive(&mut client, |log| log.check_ins().len() == 2);
    assert_eq!(offers.lock().unwrap()[0].as_str(), "lora");
    assert!(desk.log().check_ins()[1].eligible_tasks.is_empty());
}

#[test]
fn plaintext_must_be_allowed_by_name() {
    let desk = Desk::new();
    desk.answers([policy(), no_work()]);
    let mut client = desk.builder().build(desk.transport(), willing()).unwrap();
    desk.drive(&mut client, |log| log.check_ins().len() == 2);
    let capabilities = desk.log().check_ins()[1].capabilities.clone().unwrap();
    assert!(capabilities.aggregation_protocols.is_empty());
    assert!(desk.log().check_ins()[1].eligible_tasks.is_empty());
}

#[test]
fn too_little_text_is_reported_once_and_tried_again_with_more() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan()), no_work()]);
    let notes = Arc::new(Mutex::new(vec!["short".to_owned()]));
    let read = Arc::clone(&notes);
    let mut client = desk.client(App::new(move || Ok(read.lock().unwrap().clone()), always, anything));
    desk.drive(&mut client, |log| log.check_ins().len() == 3);
    assert_eq!(desk.log().results(), [TaskResult::InsufficientData]);
    assert!(desk.log().check_ins()[2].eligible_tasks.is_empty(), "it knows that it has too little");
    *notes.lock().unwrap() = texts();
    desk.drive(&mut client, |log| log.check_ins().len() == 4);
    assert_eq!(desk.log().check_ins()[3].eligible_tasks, ["lora"]);
}

#[test]
fn examples_that_cannot_be_read_cost_nothing_but_the_turn() {
    let desk = Desk::new();
    desk.answers([policy(), no_work()]);
    let locked = || Err("the notes are locked".into());
    let mut client = desk.client(App::new(locked, always, anything));
    desk.drive(&mut client, |log| log.check_ins().len() == 2);
    assert!(desk.log().check_ins()[1].eligible_tasks.is_empty());
}

#[test]
fn a_base_that_rots_on_disk_is_read_again() {
    let desk = Desk::new();
    let mut rotten = BASE.clone();
    *rotten.last_mut().unwrap() ^= 1;
    desk.keep(&BASE);
    std::fs::write(desk.blobs().path(Digest::of(&BASE)), &rotten).unwrap();
    desk.answers([policy(), assignment(&plan()), assignment(&plan())]);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.contributions() == 1);
    assert_eq!(desk.log().results(), [TaskResult::TrainingFailed]);
    assert_eq!(desk.reads_of(&BASE), 1);
}

#[test]
fn old_checkpoints_are_forgotten() {
    let desk = Desk::new();
    let mut next = fleetune_model::adapter::Adapter::init(crate::fixture::layout(&base()));
    next.values[0] += 0.5;
    let next = next.to_checkpoint_bytes();
    desk.hold(&next);
    desk.answers([policy(), assignment(&plan()), script::assignment_from(&plan(), &next)]);
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.contributions() == 2);
    assert!(!desk.blobs().holds(Digest::of(&checkpoint())) && desk.blobs().holds(Digest::of(&next)));
}

#[test]
fn a_closing_app_says_so_and_leaves() {
    let desk = Desk::new();
    desk.answers([policy(), assignment(&plan())]);
    let stop = Arc::new(AtomicBool::new(false));
    let (closing, asked) = (Arc::clone(&stop), AtomicU32::new(0));
    desk.keep(&BASE);
    desk.keep(&checkpoint());
    let closes = move || {
        closing.store(asked.fetch_add(1, Ordering::Relaxed) >= 3, Ordering::Relaxed);
        Ok(())
    };
    let mut client = desk.client(App::new(|| Ok(texts()), closes, anything));
    client.run(&stop);
    assert_eq!(desk.log().results(), [TaskResult::Interrupted], "the round need not wait");
}

#[test]
fn a_run_ends_when_its_goal_is_reached_and_nothing_is_under_way() {
    let (desk, adapter) = (Desk::new(), release_adapter(&base()));
    desk.hold(&adapter);
    desk.answer(sealed_release(&manifest(1, &adapter), 1));
    let mut client = desk.client(willing());
    client.run_with(&AtomicBool::new(false), &mut |event| {
        if matches!(event, Event::ReleaseActive(_)) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert_eq!(desk.log().release_reports(), [(1, wire::ReleaseState::Active)], "the report is out");
}

#[test]
fn one_state_directory_is_one_device() {
    let desk = Desk::new();
    let _first = desk.client(willing());
    let second = desk.builder().build(desk.transport(), willing());
    assert!(second.err().is_some_and(|error| error.to_string().contains("in use by another process")));
}

#[test]
fn releases_for_another_purpose_are_worthless() {
    let (desk, adapter) = (Desk::new(), release_adapter(&base()));
    let bytes = manifest(1, &adapter).to_bytes();
    desk.answer(script::release(fleetune_proto::seal(Purpose::Plan, bytes, &[&crate::fixture::key(1)])));
    let mut client = desk.client(willing());
    desk.drive(&mut client, |log| log.check_ins().len() == 2);
    assert_eq!(client.release_versions().active, None);
}
